"""One attempt at some samples of a shard: computed, written to local files and validated."""

from __future__ import annotations

import importlib
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import Chain
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import Plan, read_plan
from resmaster_stages.dataset.reading import chosen_samples
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.schemas import STAGE_SCHEMAS
from resmaster_stages.dataset.stages import upstream_of
from resmaster_stages.diffusion.cost import UnetCost, counting
from resmaster_stages.errors import SampleError, ShardError
from resmaster_stages.models.busy import BusyTime, timing
from resmaster_stages.progress import SampleDone, ShardStarted, emit
from resmaster_stages.runner.compute import Process, compute
from resmaster_stages.runner.quarantine import Breadcrumbs
from resmaster_stages.runner.resume import Spill
from resmaster_stages.storage.arrays import Arrays, encode_arrays
from resmaster_stages.storage.filesystem import explained
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import ShardWriter, spell_image, validate
from resmaster_stages.storage.tables import decode_table, encode_table

MODULES: dict[Stage, str] = {
    "low_res": "resmaster_stages.low_res",
    "captions": "resmaster_stages.captions",
    "high_res": "resmaster_stages.high_res",
    "quality": "resmaster_stages.quality",
}
"""Where each stage's `process` is; imported when it is needed, for these bring torch along."""


@dataclass(frozen=True)
class Work:
    """What `run_stage` was asked for."""

    dataset: Dataset
    config: DatasetConfig
    stage: Stage
    shard: int
    hashes: dict[Stage, str]
    process: Process | None
    provenance: dict[str, Any]

    @cached_property
    def plan(self) -> Plan:
        """Generations never change: one reading is enough."""
        return read_plan(self.dataset.folder)


@dataclass(frozen=True)
class Computed:
    """What an attempt at some samples of a shard has made, in local files."""

    good: list[str]
    failures: list[tuple[str, Exception]]
    images: tuple[str, ...]
    """Places of a tar's images, as commit records tell them."""
    tolerated: int
    files: list[tuple[str, Path]]
    """Name in the dataset, local file."""
    upstream: dict[str, str]
    """Upstream stage -> the attempts that were read."""
    seconds: float
    unet: UnetCost
    busy: BusyTime

    def device(self) -> dict[str, float]:
        """How long the device was at work, and the share of the stage's time in which it was not, for commit
        records."""
        share = self.busy.seconds / self.seconds if self.seconds else 0.0
        return {"busy_seconds": round(self.busy.seconds, 3), "idle_share": round(max(0.0, 1 - share), 4)}


@contextmanager
def computed(work: Work, chain: Chain, keys: Collection[str], supplement: int, attempt: str) -> Iterator[Computed]:
    """Compute `keys`; the files are there within the block. If that ends well, the shard's cache is dropped."""
    dataset, config, stage, shard = work.dataset, work.config, work.stage, work.shard
    own_hash, upstream = work.hashes[stage], upstream_of(config, stage)
    with (
        scratch_folder() as scratch,
        chosen_samples(dataset, work.plan.read(shard), keys, chain, shard, upstream) as samples,
    ):
        emit(ShardStarted(stage, shard, len(samples)))
        started = time.monotonic()
        name = layout.shard_object(stage, shard, attempt)
        features_name = layout.features_object(stage, shard, attempt)
        target, features = (scratch / Path(each).name for each in (name, features_name))
        spill = Spill(dataset.folder, stage, own_hash, shard, config.spill_seconds)
        breadcrumbs = Breadcrumbs(dataset.folder, stage, own_hash, shard, samples.keys())
        tolerated = max(1, int(config.max_failure_ratio * len(samples) + 1e-9))  # 0.29 * 100 is 28.99...
        if supplement:  # these have failed before
            tolerated = len(samples)
        outputs = compute(
            work.process or importlib.import_module(MODULES[stage]).process, config, stage, samples, spill, breadcrumbs
        )
        with counting() as unet_cost, timing() as busy_time, closing(outputs):
            good, failures, images = _write(outputs, stage, shard, own_hash, tolerated, target, features)
        yield Computed(
            good=good,
            failures=failures,
            images=images,
            tolerated=tolerated,
            files=[(name, target), *([(features_name, features)] if features.exists() else [])],
            upstream={each: " ".join(samples.attempts(each)) for each in upstream},
            seconds=time.monotonic() - started,
            unet=unet_cost,
            busy=busy_time,
        )
        spill.drop()
        breadcrumbs.forget()


def _write(
    outputs: Iterator[Output], stage: Stage, shard: int, own_hash: str, tolerated: int, target: Path, features: Path
) -> tuple[list[str], list[tuple[str, Exception]], tuple[str, ...]]:
    """Write the outputs to the local file `target`, validated, and `features` if the stage gave arrays.

    The good keys and the failures, in order, and the places of a tar's images. More errors that nobody foresaw than are
    `tolerated` end it: the rest would fail alike, and nothing will be committed.
    """
    good: list[str] = []
    images: tuple[str, ...] = ()
    arrays: list[Arrays] = []
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, Exception]] = []
    tar = ShardWriter(target) if layout.EXTENSIONS[stage] == "tar" else None
    with tar or nullcontext():
        for output in outputs:
            if output.error is not None:
                failures.append((output.key, output.error))
                if sum(not isinstance(error, SampleError) for _, error in failures) > tolerated:
                    return good, failures, ()
            else:
                if tar:
                    tar.write(output.key, output.files)
                elif not output.rows:
                    raise ShardError(f"{stage} of shard {shard:06d}: sample {output.key} has neither rows nor an error")
                rows += [{"key": output.key, **row} for row in output.rows]
                arrays.append(output.arrays)
                good.append(output.key)
            emit(SampleDone(stage, shard, ok=output.error is None))
    if tar:
        images = tuple(spell_image(entry) for entry in validate(target, good))
    else:
        schema = STAGE_SCHEMAS[stage]()
        with explained(str(target.parent)):
            target.write_bytes(encode_table(rows, schema, {"stage_hash": own_hash}))
        keys = list(dict.fromkeys(decode_table(target, schema, target.name)["key"].to_pylist()))
        if keys != good:
            raise ShardError(f"{target.name}: holds {len(keys)} samples, expected {len(good)}")
    if any(arrays):
        with explained(str(features.parent)):
            features.write_bytes(encode_arrays(good, arrays, {"stage_hash": own_hash}))
    return good, failures, images
