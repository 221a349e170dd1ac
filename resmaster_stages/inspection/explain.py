"""Explains a sample: its inputs, how and when each stage made it, its failures, and the places of its files. Or
explains a shard: its stages, the attempts at it that failed, and its samples.

Reads the plan, commit records, ledger, records of failed attempts and the sample's own shards. Loads no model and
writes nothing. Missing or damaged objects are reported in the explanation instead of raised, because users ask when
something is wrong.

Invariant: facts about a stage come from its commit record under the current configuration, never from a listing.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.attempts import FailedAttempt, failed_names, read_failures
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, current_config
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import PlannedSample, unmasked_key
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.keys import sample_seed
from resmaster_stages.models.identity import weights_of
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.shards import Member, read_index
from resmaster_stages.storage.store_errors import explained, is_damage
from resmaster_stages.storage.tables import decode_table

KEY_CHARACTERS = 24
SHARD_CHARACTERS = 6
"""Numbers of up to so many digits that are in the plan name a shard, and else the beginning of a key."""
SHOWN_MATCHES = 5


@dataclass(frozen=True)
class Bytes:
    """The place of a file of the sample inside an object, in bytes."""

    url: str
    """Path or URL of the object."""
    member: str
    """The file's name in the tar."""
    offset: int
    size: int
    fetch: str
    """A shell command that writes the file to the current folder, under its own name."""


@dataclass(frozen=True)
class StageTrace:
    """What one stage did with the sample."""

    stage: str
    stage_hash: str
    state: Literal["committed", "failed", "left out", "shard failed", "pending"]
    """`failed`: in this stage; `left out`: failed in an earlier stage; `shard failed`: an attempt at the whole shard
    ended by an error, and it has no commit; `pending`: still to be done."""
    commit: str
    """Path or URL of the shard's commit record, which need not exist."""
    receipt: Receipt | None = None
    files: tuple[Bytes, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """The content of the sample's JSON in the tar: seed, model, method and settings, sizes, digests."""
    rows: tuple[dict[str, Any], ...] = ()
    """The sample's rows of the stage's table: captions by patch, or quality."""
    take: int = 0
    """The sample's take in the stage: how often the sample was made again with a new seed."""
    take_due: int = 0
    """The take that was asked for. If it is higher, it is still to be made."""
    failures: tuple[dict[str, Any], ...] = ()
    """The sample's rows in the stage's ledger under the current configuration, by attempt."""
    attempts: tuple[FailedAttempt, ...] = ()
    """The attempts at the shard that ended by an error, in the order of time."""
    problem: str = ""
    """Why the commit record, or the object that it names, cannot be read; "" if both can."""

    @property
    def seconds_per_sample(self) -> float | None:
        """The shard's compute time divided by its samples; None without a commit or samples."""
        if self.receipt is None or not (tried := self.receipt.samples_ok + self.receipt.samples_failed):
            return None
        return self.receipt.seconds / tried


@dataclass(frozen=True)
class Redo:
    """A request to make the sample again."""

    record: str
    """Path or URL of the request."""
    stage: str
    """The first stage that makes the sample again."""
    take: int
    asked_at: str


@dataclass(frozen=True)
class Explanation:
    """All that is known of one sample."""

    dataset: str
    sample: PlannedSample
    generation: int
    config: str
    """Path or URL of the current configuration."""
    base_seed: int
    seeds: dict[str, int]
    """Stage -> seed of the sample."""
    redos: tuple[Redo, ...]
    """The requests to make the sample again, in order."""
    models: dict[str, str]
    """Part -> name of its exact weights."""
    stages: tuple[StageTrace, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for trace, own in zip(self.stages, values["stages"]):
            own["seconds_per_sample"] = trace.seconds_per_sample
        return values


@dataclass(frozen=True)
class ShardExplanation:
    """All that is known of one shard."""

    dataset: str
    shard: int
    generation: int
    stages: tuple[StageTrace, ...]
    samples: tuple[PlannedSample, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def explain_command(dataset_url: str, key: str) -> str:
    """The shell command that prints the explanation of a sample."""
    return f"resmaster explain {quoted(dataset_url)} {quoted(key)}"


def find_sample(dataset: Dataset, prefix: str) -> PlannedSample:
    """The one planned sample whose key begins with `prefix`. Raises UserError if there is none or several."""
    text = prefix.strip().lower()
    if not re.fullmatch(rf"[0-9a-f]{{1,{KEY_CHARACTERS}}}", text):
        raise UserError(
            f"{prefix!r} is no key and no shard: give up to {KEY_CHARACTERS} hex digits of a key; "
            f"{where_keys_are(dataset)}"
        )
    found = dataset.plan.find(text)
    if not found:
        raise UserError(f"{dataset.url}: no sample's key begins with {text}; {where_keys_are(dataset)}")
    if len(found) > 1:
        keys = [sample.key for sample in found]
        shown = ", ".join(keys[:SHOWN_MATCHES]) + (", ..." if len(keys) > SHOWN_MATCHES else "")
        raise UserError(f"{dataset.url}: {len(keys)} keys begin with {text} ({shown}); give more digits")
    return found[0]


def where_keys_are(dataset: Dataset) -> str:
    """Where a user finds keys."""
    published = "keys are in the report and manifest.parquet, and " if dataset.folder.exists(layout.MANIFEST) else ""
    shards = f"0 to {dataset.plan.shards - 1}" if dataset.plan.shards > 1 else "0"
    return f"{published}resmaster explain {quoted(dataset.url)} SHARD lists those of a shard ({shards})"


def shard_of(dataset: Dataset, text: str) -> int | None:
    """The shard that `text` names; None if it is no number of a planned shard."""
    if not re.fullmatch(rf"[0-9]{{1,{SHARD_CHARACTERS}}}", text) or int(text) >= dataset.plan.shards:
        return None
    return int(text)


def explain_shard(dataset: Dataset, shard: int) -> ShardExplanation:
    """Explain a planned shard."""
    traces = tuple(_shard_trace(dataset, stage, shard) for stage in dataset.hashes)
    generation = dataset.plan.generation_of(shard).number
    return ShardExplanation(dataset.url, shard, generation, traces, tuple(dataset.plan.read(shard)))


def _shard_trace(dataset: Dataset, stage: str, shard: int) -> StageTrace:
    """What one stage did with a shard, from its commit record and the records of failed attempts."""
    commits = dataset.commits(stage)
    attempts = tuple(read_failures(commits, failed_names(commits, {shard})))
    trace = StageTrace(
        stage=stage,
        stage_hash=commits.stage_hash,
        state="shard failed" if attempts else "pending",
        commit=dataset.folder.url_of(layout.commit(stage, commits.stage_hash, shard)),
        attempts=attempts,
    )
    try:
        receipt = commits.read(shard)
    except ShardError as error:
        return replace(trace, problem=str(error))
    if receipt is None:
        return trace
    record = dataset.folder.url_of(layout.commit(stage, commits.stage_hash, shard, receipt.number))
    damaged = f"is marked as damaged; run: resmaster repair {quoted(dataset.url)}" if commits.is_marked(shard) else ""
    return replace(trace, state="committed", commit=record, receipt=receipt, problem=damaged)


def explain(dataset: Dataset, prefix: str) -> Explanation:
    """Explain the sample whose key begins with `prefix`. Raises UserError if there is none or several."""
    sample = find_sample(dataset, prefix)
    config, weights = dataset.config, asdict(weights_of(dataset.config))
    traces: list[StageTrace] = []
    asked, due = dataset.redos.asked(sample.shard), 0
    for stage in dataset.hashes:
        lost = any(trace.state in ("failed", "left out") for trace in traces)
        trace = _trace(dataset, stage, sample, lost)
        take = trace.receipt.takes.get(sample.key, 0) if trace.receipt else 0
        due = max(due, take, asked.get(stage, {}).get(sample.key, 0))
        traces.append(replace(trace, take=take, take_due=due))
    return Explanation(
        dataset=dataset.url,
        sample=sample,
        generation=dataset.plan.generation_of(sample.shard).number,
        config=dataset.folder.url_of(current_config(dataset.folder)),
        base_seed=config.seed,
        seeds={
            stage: sample_seed(unmasked_key(sample) if stage == "low_res" else sample.key, config.seed, stage, take)
            for stage, take in ((each.stage, each.take if each.receipt else each.take_due) for each in traces)
            if stage == "high_res" or (stage == "low_res" and not config.images)
        },
        redos=tuple(
            Redo(dataset.folder.url_of(layout.redo(request.number)), request.stage, takes[sample.key], request.asked_at)
            for request in dataset.redos.requests
            if sample.key in (takes := request.takes.get(str(sample.shard), {}))
        ),
        models={part: name for part, name in weights.items() if name},
        stages=tuple(traces),
    )


def _trace(dataset: Dataset, stage: str, sample: PlannedSample, lost: bool) -> StageTrace:
    failures = [row for row in ledger_rows(dataset.commits(stage), {sample.shard}) if row["key"] == sample.key]
    trace = replace(
        _shard_trace(dataset, stage, sample.shard),
        failures=tuple(sorted(failures, key=lambda row: int(row["attempt_number"]))),
    )
    receipt = trace.receipt
    if receipt is None and trace.problem:
        return trace
    if receipt is None:
        return replace(trace, state="left out" if lost else "failed" if failures else trace.state)
    if lost or sample.key in receipt.failed_keys:
        return replace(trace, state="left out" if lost else "failed")
    if sample.key in receipt.lost_keys:  # it became good upstream since
        return replace(trace, state="pending")
    trace = replace(trace, state="committed")
    name, made_by = receipt.objects[0].name, STAGES[stage]
    try:
        if made_by.schema is None:
            files, facts = _in_tar(dataset.folder, name, sample.key)
            return replace(trace, files=files, facts=facts)
        table = decode_table(dataset.folder.read(name), made_by.columns(dataset.config), name).to_pylist()
    except ShardError as error:
        return replace(trace, problem=str(error))
    except (OSError, UserError) as error:
        gone = isinstance(error, FileNotFoundError)
        if not gone and not is_damage(error):
            raise
        what = "is gone" if gone else "cannot be read"
        place = quoted(dataset.url)
        mend = f"run: resmaster verify {place}, then: resmaster repair {place}"
        return replace(trace, problem=f"{name} {what}; {mend}")
    own = [row for row in table if row["key"] == sample.key]
    if stage == "captions":
        own.sort(key=lambda row: (row["row"], row["col"]))
    return replace(trace, rows=tuple(own))


def _in_tar(folder: Folder, name: str, key: str) -> tuple[tuple[Bytes, ...], dict[str, Any]]:
    """The sample's files in a tar, and its JSON. Raises FileNotFoundError, and ShardError if the tar is damaged."""
    with explained(folder.url_of(name)), folder.open(name) as file:
        entry = next((entry for entry in read_index(file, name) if entry.key == key), None)
        if entry is None:
            raise ShardError(f"{name}: lacks sample {key}, which its commit record counts")
        meta = entry.members["json"]
        file.seek(meta.offset)
        try:
            facts = json.loads(file.read(meta.size))
        except ValueError as error:
            raise ShardError(f"{name}: the json of sample {key} is not JSON ({error})") from error
    places = [
        Bytes(folder.url_of(name), member.name, member.offset, member.size, fetch_command(folder, name, member))
        for member in entry.members.values()
    ]
    return tuple(places), facts


def fetch_command(folder: Folder, name: str, member: Member) -> str:
    """A shell command that writes `member` of the tar `name` to the current folder, by one range read.

    It uses tail and head for local files, the AWS command line (which also reads AWS_ENDPOINT_URL) for S3, and Python
    with fsspec for other stores.
    """
    if not member.size:  # a range of no bytes is invalid, and a store may answer it with the whole object
        return f": > {shlex.quote(member.name)}"
    url, first, last = folder.url_of(name), member.offset, member.offset + member.size - 1
    if folder.local:
        return f"tail -c +{first + 1} {shlex.quote(url)} | head -c {member.size} > {shlex.quote(member.name)}"
    scheme, _, path = url.partition("://")
    if scheme == "s3":
        bucket, _, key = path.partition("/")
        place = f"--bucket {shlex.quote(bucket)} --key {shlex.quote(key)} --range bytes={first}-{last}"
        return f"aws s3api get-object {place} {shlex.quote(member.name)}"
    read = f"import fsspec; file = fsspec.open({url!r}).open(); file.seek({first})"
    code = f"{read}; open({member.name!r}, 'wb').write(file.read({member.size}))"
    return shlex.join(["python", "-c", code])


# ----------------------------------------------------------------------------------------------------------------------
# as text


def spelled(explanation: Explanation | ShardExplanation) -> str:
    """The explanation as lines of text."""
    if isinstance(explanation, ShardExplanation):
        return "\n".join(_shard_lines(explanation))
    return "\n".join(_lines(explanation))


def _line(label: str, text: object, indent: int = 0) -> str:
    return f"{' ' * indent}{label:<{11 - indent}} {text}"


def _lines(explanation: Explanation) -> Iterator[str]:
    sample = explanation.sample
    yield _line("key", sample.key)
    yield _line("dataset", explanation.dataset)
    place = f"sample {sample.index}, shard {sample.shard:06d}, generation {explanation.generation} of the plan"
    yield _line("place", place + (f", replica {sample.replica}" if sample.replica else ""))
    yield _line("prompt", sample.prompt or "(none)")
    if sample.negative_prompt:
        yield _line("negative", sample.negative_prompt)
    if sample.source:
        yield _line("source", sample.source)
    seeds = [f"base {explanation.base_seed}", *(f"{stage} {seed}" for stage, seed in explanation.seeds.items())]
    yield _line("seeds", ", ".join(seeds))
    for redo in explanation.redos:
        yield _line("redo", f"take {redo.take}, from {redo.stage} on, asked for at {redo.asked_at} ({redo.record})")
    for part, name in explanation.models.items():
        yield _line(part, name)
    yield _line("config", explanation.config)
    for trace in explanation.stages:
        yield ""
        yield from _stage_lines(trace, sample.key)


def _shard_lines(explanation: ShardExplanation) -> Iterator[str]:
    count = len(explanation.samples)
    yield _line("shard", f"{explanation.shard:06d}, {count} samples, generation {explanation.generation} of the plan")
    yield _line("dataset", explanation.dataset)
    for trace in explanation.stages:
        yield ""
        yield from _stage_lines(trace)
        if trace.receipt and trace.receipt.takes:
            yield _line("take", ", ".join(f"{key} {take}" for key, take in trace.receipt.takes.items()), 2)
        if trace.receipt and trace.receipt.failed_keys:
            yield _line("failed", ", ".join(trace.receipt.failed_keys), 2)
    yield ""
    for sample in explanation.samples:
        yield _line("sample", f"{sample.key}  {sample.prompt or '(no prompt)'}")


def _stage_lines(trace: StageTrace, key: str | None = None) -> Iterator[str]:
    """The lines about a stage of a shard or, with `key`, of one of its samples."""
    receipt = trace.receipt
    facts: list[str] = [trace.state]
    if trace.take and receipt:
        facts.append(f"take {trace.take}")
    if trace.take < trace.take_due:
        facts.append(f"take {trace.take_due} is still to be made")
    if receipt:
        share = trace.seconds_per_sample
        facts += [
            f"attempt {receipt.attempt}",
            f"finished {receipt.finished_at}",
            f"shard took {receipt.seconds:.1f} s",
        ]
        facts += [f"{share:.2f} s per sample"] if share is not None else []
        idle = receipt.provenance.get("device", {}).get("idle_share")  # records of earlier versions have none
        facts += [f"device idle {idle:.0%} of it"] if idle is not None else []
    yield _line(trace.stage, ", ".join(facts))
    yield _line("commit", trace.commit + ("" if receipt else " (none)"), 2)
    if receipt:
        made_by = _made_by(receipt.provenance)
        if made_by:
            yield _line("made by", made_by, 2)
        for batch in receipt.batches[1:]:
            if key in (None, *batch.keys):
                whose = "this sample" if key else ", ".join(batch.keys)
                yield _line("batch", f"{batch.spelled()}: {whose}; the others {receipt.batches[0].spelled()}", 2)
        for stored in receipt.objects:
            yield _line("object", f"{stored.name}, {stored.bytes} bytes, sha256 {stored.sha256}", 2)
    for place in trace.files:
        yield _line("file", f"{place.member}, offset {place.offset}, {place.size} bytes", 2)
        yield _line("", place.fetch, 2)
    for name, value in trace.facts.items():
        if name not in ("key", "prompt"):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield _line("fact", f"{name} {shown}", 2)
    for row in trace.rows:
        yield _row_line(trace.stage, row)
    for row in trace.failures:
        text = f"attempt {row['attempt_number']} ({row['attempt']}): {row['error_class']}: {row['message']}"
        yield _line("failure", text, 2)
    for attempt in trace.attempts:
        yield _line("attempt", attempt.spelled(), 2)
    if trace.problem:
        yield _line("problem", trace.problem, 2)


def _made_by(provenance: dict[str, Any]) -> str:
    """Host, device, runs and versions of a commit record, in one line."""
    parts = [f"{name} {provenance[name]}" for name in ("host", "gpu", "python") if name in provenance]
    parts += [f"{name} {version}" for name, version in provenance.get("versions", {}).items()]
    parts += [
        f"{name.replace('_', ' ')} {provenance[name]}"
        for name in ("flow_run", "flow_run_name", "task_run")
        if name in provenance
    ]
    return ", ".join(parts)


def _row_line(stage: str, row: dict[str, Any]) -> str:
    if stage == "captions":
        box = f"y {row['y0']}-{row['y1']}, x {row['x0']}-{row['x1']}"
        notes = [row["status"]] if row["status"] != "ok" else []
        notes += ["shortened"] if row["truncated"] else []
        notes += [f"fit {row['fit']:.1f}"] if row.get("fit") is not None else []
        note = f" ({', '.join(notes)})" if notes else ""
        return _line("patch", f"{row['row']},{row['col']} ({box}): {row['caption']}{note}", 2)
    if stage == "recaptions":
        return _line("caption", f"{row['style']}: {row['caption'] or '(none)'}", 2)
    measures = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("key", "flags") and value is not None
    ]
    flags = f"; flags: {', '.join(row['flags']) or 'none'}" if "flags" in row else ""
    return _line(stage, ", ".join(measures) + flags, 2)
