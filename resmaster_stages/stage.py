"""The driver: one stage over one shard, from verified upstream objects to one commit. And what is still to do.

Knows nothing about Prefect, and of each stage only its `process` function.

Invariants:
- A shard that is committed is never computed again.
- A failed sample costs a ledger row; too many in a shard cost the commit, and the ledger rows stay.
- Upstream objects are read by their commit record and checked against its sha256.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from resmaster_stages.config import DatasetConfig, Stage, stage_hash
from resmaster_stages.diffusion.cost import counting
from resmaster_stages.errors import PlanError, ShardError
from resmaster_stages.progress import reporter
from resmaster_stages.storage import layout
from resmaster_stages.storage.arrays import Arrays, decode_arrays, encode_arrays
from resmaster_stages.storage.commit import (
    Receipt,
    StoredObject,
    commit,
    committed_shards,
    list_commits,
    new_attempt,
    read_commit,
)
from resmaster_stages.storage.dataset import Dataset, Output, Picture, Sample
from resmaster_stages.storage.filesystem import explained
from resmaster_stages.storage.ledger import encode_failures, ledger_rows, one_line
from resmaster_stages.storage.plan import Plan, PlannedSample, read_plan
from resmaster_stages.storage.shards import Entry, ShardWriter, read_index, read_member, validate
from resmaster_stages.storage.tables import STAGE_SCHEMAS, decode_table, encode_table

Process = Callable[[DatasetConfig, Sequence[Sample]], Iterator[Output]]

MODULES: dict[Stage, str] = {
    "low_res": "resmaster_stages.low_res",
    "captions": "resmaster_stages.captions",
    "high_res": "resmaster_stages.upscale",
    "quality": "resmaster_stages.quality",
}
"""Where each stage's `process` is; imported when it is needed, for these bring torch along."""

LIBRARIES = ("resmaster-pipeline", "torch", "diffusers", "transformers", "webdataset", "pyarrow", "pillow")


def upstream_of(config: DatasetConfig, stage: Stage) -> tuple[Stage, ...]:
    """The stages whose output `stage` reads."""
    if stage == "low_res":
        return ()
    if stage == "captions":
        return ("low_res",)
    if stage == "high_res":
        return ("low_res", "captions") if config.upscale.uses_captions() else ("low_res",)
    return ("low_res", "high_res")


def stage_hashes(config: DatasetConfig) -> dict[Stage, str]:
    """The identity of every stage that the dataset needs."""
    from resmaster_stages.models.identity import weights_of

    weights = weights_of(config)
    return {stage: stage_hash(config, stage, weights) for stage in config.stages()}


def run_stage(
    dataset: Dataset,
    config: DatasetConfig,
    stage: Stage,
    shard: int,
    *,
    process: Process | None = None,
    provenance: dict[str, Any] | None = None,
) -> Receipt:
    """Compute and commit one stage of one shard, or return the receipt that is there.

    `process` replaces the stage's own function; `provenance` is added to the commit record's volatile facts.
    Raises PlanError if the shard is not planned or an upstream stage is not committed, ShardError if too many samples
    failed or an upstream object is damaged.
    """
    hashes = stage_hashes(config)
    if stage not in hashes:
        raise PlanError(f"{dataset.url}: this configuration needs no stage {stage!r}; it needs {', '.join(hashes)}")
    done = read_commit(dataset.folder, stage, hashes[stage], shard)
    if done is not None:
        reporter().shard_done(stage, shard, cached=True)
        return done
    plan = read_plan(dataset.folder)
    attempt = new_attempt()
    with (
        tempfile.TemporaryDirectory(prefix=f"resmaster-{stage}-") as scratch,
        shard_samples(dataset, config, plan, shard, upstream_of(config, stage), hashes) as samples,
    ):
        reporter().shard_started(stage, shard, len(samples))
        started = time.monotonic()
        name = layout.shard_object(stage, shard, attempt)
        features_name = layout.features_object(stage, shard, attempt)
        target, features = (Path(scratch) / Path(each).name for each in (name, features_name))
        compute = process or importlib.import_module(MODULES[stage]).process
        with counting() as unet_cost:
            good, failures = _compute(compute, config, stage, shard, hashes[stage], samples, target, features)
        seconds = time.monotonic() - started
        ledger = None
        if failures:
            ledger = encode_failures(dataset.folder, stage, hashes[stage], shard, attempt, failures)
            tolerated = max(1, int(config.max_failure_ratio * len(samples) + 1e-9))  # 0.29 * 100 is 28.99...
            if len(failures) > tolerated:
                ledger_name = layout.ledger(stage, shard, attempt)
                dataset.folder.write(ledger_name, ledger)
                key, error = failures[0]
                raise ShardError(
                    f"{stage} of shard {shard:06d}: {len(failures)} of {len(samples)} samples failed (tolerated: "
                    f"{tolerated}), nothing committed; first: {key}: {type(error).__name__}: {one_line(error)}; "
                    f"all in {ledger_name}"
                )
        receipt = commit(
            dataset.folder,
            Receipt(
                stage=stage,
                stage_hash=hashes[stage],
                shard=shard,
                attempt=attempt,
                generation=plan.generation_of(shard).number,
                samples_ok=len(good),
                samples_failed=len(failures),
                failed_keys=tuple(key for key, _ in failures),
                keys_digest=digest_of_keys(good),
                upstream={name: found.attempt for name, found in samples.receipts.items()},
                seconds=round(seconds, 3),
                finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance={**own_provenance(), "unet": asdict(unet_cost), **(provenance or {})},
            ),
            [(name, target), *([(features_name, features)] if features.exists() else [])],
            ledger,
        )
    reporter().shard_done(stage, shard, cached=False)
    return receipt


def _compute(
    process: Process,
    config: DatasetConfig,
    stage: Stage,
    shard: int,
    own_hash: str,
    samples: ShardSamples,
    target: Path,
    features: Path,
) -> tuple[list[str], list[tuple[str, Exception]]]:
    """Run `process` and write the local file `target`, validated, and `features` if the stage gave arrays.

    The good keys and the failures, in order.
    """
    good: list[str] = []
    arrays: list[Arrays] = []
    failures: list[tuple[str, Exception]] = []
    outputs = _checked(process(config, samples) if len(samples) else iter(()), samples.keys(), stage)
    if layout.EXTENSIONS[stage] == "tar":
        with ShardWriter(target) as writer:
            for output in outputs:
                if output.error is None:
                    writer.write(output.key, output.files)
                    arrays.append(output.arrays)
                    good.append(output.key)
                else:
                    failures.append((output.key, output.error))
                reporter().sample_done(stage, shard, ok=output.error is None)
        validate(target, good)
    else:
        rows: list[dict[str, Any]] = []
        for output in outputs:
            if output.error is None:
                if not output.rows:
                    raise ShardError(f"{stage} of shard {shard:06d}: sample {output.key} has neither rows nor an error")
                rows += [{"key": output.key, **row} for row in output.rows]
                arrays.append(output.arrays)
                good.append(output.key)
            else:
                failures.append((output.key, output.error))
            reporter().sample_done(stage, shard, ok=output.error is None)
        schema = STAGE_SCHEMAS[stage]
        with explained(str(target.parent)):
            target.write_bytes(encode_table(rows, schema, {"stage_hash": own_hash}))
        keys = list(dict.fromkeys(decode_table(target, schema, target.name)["key"].to_pylist()))
        if keys != good:
            raise ShardError(f"{target.name}: holds {len(keys)} samples, expected {len(good)}")
    if any(arrays):
        with explained(str(features.parent)):
            features.write_bytes(encode_arrays(good, arrays, {"stage_hash": own_hash}))
    return good, failures


def _checked(outputs: Iterator[Output], keys: list[str], stage: Stage) -> Iterator[Output]:
    """Pass outputs on, as long as there is exactly one per key, in order."""
    count = 0
    for output in outputs:
        expected = keys[count] if count < len(keys) else "nothing more"
        if output.key != expected:
            raise ShardError(f"the stage {stage} gave sample {output.key} where {expected} was due")
        count += 1
        yield output
    if count < len(keys):
        raise ShardError(f"the stage {stage} gave {count} of {len(keys)} samples")


# ----------------------------------------------------------------------------------------------------------------------
# reading


class ShardSamples(Sequence[Sample]):
    """The samples of a shard that survived the stages named, in the plan's order. Pictures are read when asked for."""

    def __init__(
        self,
        planned: list[PlannedSample],
        receipts: dict[Stage, Receipt],
        tars: dict[Stage, tuple[Path, dict[str, Entry]]],
        tables: dict[Stage, dict[str, list[dict[str, Any]]]],
    ) -> None:
        self.planned = planned
        self.receipts = receipts
        self._tars = tars
        self._tables = tables

    def __len__(self) -> int:
        return len(self.planned)

    @overload
    def __getitem__(self, position: int) -> Sample: ...

    @overload
    def __getitem__(self, position: slice) -> list[Sample]: ...

    def __getitem__(self, position: int | slice) -> Sample | list[Sample]:
        if isinstance(position, slice):
            return [self[index] for index in range(*position.indices(len(self)))]
        planned = self.planned[position]
        return Sample(
            key=planned.key,
            index=planned.index,
            prompt=planned.prompt,
            negative_prompt=planned.negative_prompt,
            height=planned.height,
            width=planned.width,
            replica=planned.replica,
            source=planned.source,
            low_res=self._picture("low_res", planned.key),
            captions=tuple(self.rows("captions", planned.key)),
            high_res=self._picture("high_res", planned.key),
        )

    def keys(self) -> list[str]:
        """The keys in order, without reading a picture."""
        return [planned.key for planned in self.planned]

    def rows(self, stage: Stage, key: str) -> list[dict[str, Any]]:
        """A sample's rows in a stage's table; none where the stage was not loaded."""
        return self._tables.get(stage, {}).get(key, [])

    def _picture(self, stage: Stage, key: str) -> Picture | None:
        if stage not in self._tars:
            return None
        path, entries = self._tars[stage]
        extension, member = entries[key].image
        meta = json.loads(read_member(path, entries[key].members["json"]))
        return Picture(read_member(path, member), extension, meta)


@contextmanager
def shard_samples(
    dataset: Dataset,
    config: DatasetConfig,
    plan: Plan,
    shard: int,
    stages: Sequence[Stage],
    hashes: dict[Stage, str] | None = None,
) -> Iterator[ShardSamples]:
    """The samples of a shard with what `stages` made of them, verified; usable within the block.

    Raises PlanError if one of the stages is not committed, ShardError if an object is gone or damaged.
    """
    hashes = hashes or stage_hashes(config)
    planned = plan.read(shard)
    receipts: dict[Stage, Receipt] = {}
    for stage in stages:
        receipt = read_commit(dataset.folder, stage, hashes[stage], shard)
        if receipt is None:
            raise PlanError(
                f"{dataset.url}: shard {shard:06d} has no commit of stage {stage} under this configuration; "
                f"run: resmaster repair {dataset.url}"
            )
        receipts[stage] = receipt
    failed = {key for receipt in receipts.values() for key in receipt.failed_keys}
    survivors = [sample for sample in planned if sample.key not in failed]
    tars: dict[Stage, tuple[Path, dict[str, Entry]]] = {}
    tables: dict[Stage, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="resmaster-read-") as scratch:
        for stage, receipt in receipts.items():
            path = fetch(dataset, receipt, receipt.objects[0], Path(scratch))
            if layout.EXTENSIONS[stage] == "tar":
                with path.open("rb") as file:
                    entries = {entry.key: entry for entry in read_index(file, receipt.objects[0].name)}
                tars[stage] = (path, entries)
                found = set(entries)
            else:
                rows: dict[str, list[dict[str, Any]]] = {}
                for row in decode_table(path, STAGE_SCHEMAS[stage], receipt.objects[0].name).to_pylist():
                    rows.setdefault(row["key"], []).append(row)
                if stage == "captions":
                    for own in rows.values():
                        own.sort(key=lambda row: (row["row"], row["col"]))
                tables[stage] = rows
                found = set(rows)
            if missing := [sample.key for sample in survivors if sample.key not in found]:
                raise ShardError(_damaged(dataset, receipt, f"lacks {len(missing)} samples, {missing[0]} first"))
        yield ShardSamples(survivors, receipts, tars, tables)


def committed_arrays(dataset: Dataset, receipt: Receipt) -> dict[str, dict[str, NDArray[Any]]]:
    """Key -> arrays (by name) that a commit holds besides its main object; empty if it has none.

    Raises ShardError if they are gone or damaged.
    """
    name = layout.features_object(receipt.stage, receipt.shard, receipt.attempt)
    for stored in receipt.objects[1:]:
        if stored.name == name:
            with tempfile.TemporaryDirectory(prefix="resmaster-read-") as scratch:
                keys, arrays = decode_arrays(fetch(dataset, receipt, stored, Path(scratch)), name)
            return {key: {each: values[row] for each, values in arrays.items()} for row, key in enumerate(keys)}
    return {}


def fetch(dataset: Dataset, receipt: Receipt, stored: StoredObject, scratch: Path) -> Path:
    """One object of a commit as a local file, checked against its record. Raises ShardError."""
    try:
        path, sha256 = dataset.folder.download(stored.name, scratch)
    except FileNotFoundError as error:
        raise ShardError(_damaged(dataset, receipt, "is gone", stored)) from error
    if sha256 != stored.sha256:
        raise ShardError(_damaged(dataset, receipt, "is damaged (sha256 differs)", stored))
    return path


def _damaged(dataset: Dataset, receipt: Receipt, what: str, stored: StoredObject | None = None) -> str:
    stored = stored or receipt.objects[0]
    record = dataset.folder.url_of(layout.commit(receipt.stage, receipt.stage_hash, receipt.shard))
    return f"{stored.name} {what}; delete {record}, then run: resmaster repair {dataset.url}"


def digest_of_keys(keys: Sequence[str]) -> str:
    """sha256 (64 hex digits) of keys in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def own_provenance() -> dict[str, Any]:
    """Volatile facts of this process: versions, host, device (without loading anything to find out)."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


# ----------------------------------------------------------------------------------------------------------------------
# what is done, and what is to do


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is. Every shard is either committed, pending or failed."""

    stage: Stage
    committed: int
    pending: int
    failed: int
    """Shards that were tried, had too many failures and have no commit."""
    failed_shards: tuple[int, ...]
    samples_ok: int
    samples_failed: int
    """Samples that failed in committed shards, and those whose failure keeps a shard from being committed."""
    seconds: float
    """Compute time of all commits."""


@dataclass(frozen=True)
class Status:
    """How far a dataset is."""

    shards: int
    samples: int
    stages: tuple[StageStatus, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def status(dataset: Dataset, config: DatasetConfig | None = None) -> Status:
    """How far each stage is, from commit records and, for what is not committed, the ledger."""
    plan = read_plan(dataset.folder)
    stages = []
    for stage, own_hash in stage_hashes(config or dataset.config).items():
        receipts = list_commits(dataset.folder, stage, own_hash)
        missing = set(range(plan.shards)) - receipts.keys()
        rows = ledger_rows(dataset.folder, stage, missing) if missing else []
        failures = {(row["shard"], row["key"]) for row in rows if row["stage_hash"] == own_hash}
        failed_shards = tuple(sorted({shard for shard, _ in failures}))
        stages.append(
            StageStatus(
                stage=stage,
                committed=len(receipts),
                pending=len(missing) - len(failed_shards),
                failed=len(failed_shards),
                failed_shards=failed_shards,
                samples_ok=sum(receipt.samples_ok for receipt in receipts.values()),
                samples_failed=sum(receipt.samples_failed for receipt in receipts.values()) + len(failures),
                seconds=round(sum(receipt.seconds for receipt in receipts.values()), 3),
            )
        )
    return Status(plan.shards, plan.samples, tuple(stages))


def pending(
    dataset: Dataset,
    config: DatasetConfig | None = None,
    *,
    shards: Sequence[int] | None = None,
    stages: Sequence[Stage] | None = None,
) -> dict[Stage, list[int]]:
    """Stage -> shards that are not committed, of `shards` and `stages` (default: all). Raises PlanError if not planned."""
    plan = read_plan(dataset.folder)
    wanted = list(range(plan.shards)) if shards is None else sorted(set(shards))
    for shard in wanted:
        plan.generation_of(shard)
    todo: dict[Stage, list[int]] = {}
    for stage, own_hash in stage_hashes(config or dataset.config).items():
        if stages is None or stage in stages:
            committed = set(committed_shards(dataset.folder, stage, own_hash))
            todo[stage] = [shard for shard in wanted if shard not in committed]
    return todo


def pending_samples(dataset: Dataset, todo: dict[Stage, list[int]]) -> dict[Stage, int]:
    """Stage -> number of planned samples in the shards of `todo`."""
    plan = read_plan(dataset.folder)
    return {stage: sum(plan.size(shard) for shard in shards) for stage, shards in todo.items()}
