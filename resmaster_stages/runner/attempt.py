"""Makes one attempt at a shard: computes its samples, writes them to local files and validates the files.

This module knows of each stage only the stage's row in the table of stages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.batches import Batch
from resmaster_stages.dataset.chain import Chain
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import ShardSamples, chosen_samples
from resmaster_stages.dataset.redo import Takes
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.stages import Process, Stage, reads_of
from resmaster_stages.diffusion.cost import UnetCost, counting
from resmaster_stages.errors import SampleError, ShardError
from resmaster_stages.models.busy import BusyTime, timing
from resmaster_stages.progress import Glance, SampleDone, ShardStarted, emit
from resmaster_stages.redaction import one_line
from resmaster_stages.runner.compute import compute
from resmaster_stages.runner.quarantine import Breadcrumbs
from resmaster_stages.runner.resume import Origins, Spill
from resmaster_stages.storage.arrays import Arrays, encode_arrays
from resmaster_stages.storage.scratch import scratch_folder
from resmaster_stages.storage.shards import IMAGE_EXTENSIONS, ShardWriter, spell_image, validate
from resmaster_stages.storage.store_errors import explained
from resmaster_stages.storage.tables import decode_table, encode_table


@dataclass
class Clock:
    """The time of an attempt."""

    started: float = field(default_factory=lambda: time.monotonic())
    saved: float = 0.0
    """Seconds of work in samples that the attempt has spilled, so that they are not lost if it fails."""

    def lost(self) -> float:
        """Seconds that are in vain if the attempt fails now."""
        return max(0.0, time.monotonic() - self.started - self.saved)


@dataclass(frozen=True)
class Work:
    """One stage of one shard that is to be computed."""

    dataset: Dataset
    stage: Stage
    shard: int
    chain: Chain
    """The commits of the shard up to this stage."""
    process: Process
    takes: Takes = field(default_factory=dict)
    """Sample -> the take that is made of it. Samples of take 0 are absent."""
    clock: Clock = field(default_factory=Clock)

    @property
    def commits(self) -> Commits:
        """The stage's commits."""
        return self.dataset.commits(self.stage.name)

    @property
    def upstream(self) -> dict[str, str]:
        """Earlier stage -> its attempt that is read."""
        committed = self.chain.committed
        return {name: committed[name].attempt for name in self.stage.reads if name in committed}

    @property
    def place(self) -> str:
        """Stage and shard, for messages."""
        return f"{self.stage.name} of shard {self.shard:06d}"


@dataclass
class Made:
    """The result of an attempt, in local files."""

    target: Path
    """The tar or table."""
    features: Path
    """The file of arrays; it exists only if the stage gave arrays."""
    good: list[str] = field(default_factory=list)
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    batches: dict[str, Batch] = field(default_factory=dict)
    """How the good samples were computed that were not made by an earlier attempt."""
    images: tuple[str, ...] = ()
    """Places of the images in the tar, as commit records hold them."""
    seconds: float = 0.0
    resumed_seconds: float = 0.0
    """Time in which killed or failed attempts made the samples that are taken from them."""
    unet: UnetCost = field(default_factory=UnetCost)
    busy: BusyTime = field(default_factory=BusyTime)

    def device(self) -> dict[str, float]:
        """For commit records: seconds in which the device was busy, and the share of time in which it was idle."""
        share = self.busy.seconds / self.seconds if self.seconds else 0.0
        return {"busy_seconds": round(self.busy.seconds, 3), "idle_share": round(max(0.0, 1 - share), 4)}

    def objects(self, work: Work, attempt: str) -> list[tuple[str, Path]]:
        """(name in the dataset, local file) of each object."""
        place = (work.stage.name, work.shard, attempt)
        features = [(layout.features_object(*place), self.features)] if self.features.exists() else []
        return [(layout.shard_object(*place), self.target), *features]


@contextmanager
def computed(
    work: Work,
    without: frozenset[str],
    number: int,
    earlier: Mapping[str, Output],
    batches: Mapping[str, Batch] | None = None,
) -> Iterator[Made]:
    """Compute the samples of the shard, except the keys in `without`. The files exist within the block.

    If the block ends without an error, the shard's cache is deleted. If it ends with a ShardError, samples that killed
    the process get another chance the next time.

    number: of the attempt; 0: a commit is made again. In all but the first, any number of samples may fail. earlier:
    outputs that are passed on unchanged. batches: key -> the batch of a record; then only these samples are made.
    """
    dataset, stage, shard, config = work.dataset, work.stage, work.shard, work.dataset.config
    with (
        scratch_folder() as scratch,
        chosen_samples(dataset, shard, work.chain, reads_of(config, stage.name), without, work.takes) as samples,
    ):
        due = samples.keys() if batches is None else batches
        emit(ShardStarted(stage.name, shard, sum(key not in earlier for key in due)))
        started = time.monotonic()
        made = Made(scratch / f"{stage.name}.{stage.extension}", scratch / f"{stage.name}.features.parquet")
        cache = dataset.folder.names(layout.spill_folder(stage.name, work.commits.stage_hash, shard))
        spill = Spill(work.commits, shard, config.spill_seconds, cache, Origins(work.upstream, work.takes))
        breadcrumbs = Breadcrumbs(work.commits, shard, samples.keys(), cache, number)
        outputs = compute(work.process, config, stage, samples, earlier, spill, breadcrumbs, batches)
        most = config.tolerated(len(samples)) if number == 1 else len(samples)
        try:
            with counting() as made.unet, timing() as made.busy, closing(outputs):
                _write(made, outputs, work, most, earlier, samples)
        finally:
            work.clock.saved += spill.saved_seconds
        made.seconds, made.resumed_seconds = time.monotonic() - started, spill.resumed_seconds
        try:
            yield made
        except ShardError:
            breadcrumbs.forget()
            if batches is not None:
                spill.drop()  # made in the right batches and yet with other bytes: by another machine
            raise
        spill.drop()
        breadcrumbs.forget()


def _write(
    made: Made,
    outputs: Iterator[Output],
    work: Work,
    most: int,
    earlier: Mapping[str, Output],
    samples: ShardSamples,
) -> None:
    """Write the outputs to local files, and validate the files.

    Stops after more than `most` unforeseen errors (others than SampleError), because the rest would fail the same way
    and nothing will be committed.
    """
    arrays: list[Arrays] = []
    rows: list[dict[str, Any]] = []
    tar = ShardWriter(made.target) if work.stage.schema is None else None
    with tar or nullcontext():
        for output in outputs:
            if output.error is not None:
                made.failures.append((output.key, output.error))
                if sum(not isinstance(error, SampleError) for _, error in made.failures) > most:
                    return
            else:
                if tar:
                    tar.write(output.key, output.files)
                elif not output.rows:
                    raise ShardError(f"{work.place}: sample {output.key} has neither rows nor an error")
                rows += [{"key": output.key, **row} for row in output.rows]
                arrays.append(output.arrays)
                made.good.append(output.key)
                if output.batch:
                    made.batches[output.key] = output.batch
            if output.key not in earlier:
                emit(_sample_done(work, output, samples))
    facts = {"stage_hash": work.commits.stage_hash}
    if work.stage.schema is None:
        made.images = tuple(spell_image(entry) for entry in validate(made.target, made.good))
    else:
        schema = work.stage.columns(work.dataset.config)
        with explained(str(made.target.parent)):
            made.target.write_bytes(encode_table(rows, schema, facts))
        keys = list(dict.fromkeys(decode_table(made.target, schema, made.target.name)["key"].to_pylist()))
        if keys != made.good:
            raise ShardError(f"{made.target.name}: holds {len(keys)} samples, expected {len(made.good)}")
    if any(arrays):
        with explained(str(made.features.parent)):
            made.features.write_bytes(encode_arrays(made.good, arrays, facts))


def _sample_done(work: Work, output: Output, samples: ShardSamples) -> SampleDone:
    """The event of a finished output."""

    def glance() -> Glance:
        sample = samples[samples.keys().index(output.key)]
        read = {"low_res": sample.low_res, "high_res": sample.high_res}
        images = {stage: image.data for stage, image in read.items() if image is not None}
        if made := [data for name, data in output.files.items() if name in IMAGE_EXTENSIONS]:
            images[work.stage.name] = made[0]
        return Glance(sample.prompt, images)

    error = "" if output.error is None else one_line(output.error)
    return SampleDone(work.stage.name, work.shard, output.error is None, output.key, error, glance)
