"""`build`: a whole dataset in the caller's own process, without Prefect and without any server.

Invariants:
- What is done is kept, whatever ends the build: a KeyboardInterrupt, an error, a callback that raises, a kill. The same
  call goes on, and the result is the same to the byte.
- The samples, their bytes and the records are those of `resmaster run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.dataset.chain import Chain, read_chain
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ConfigError, ResMasterError
from resmaster_stages.inspection.shortfall import shortfall
from resmaster_stages.inspection.status import pending, pending_samples, status
from resmaster_stages.library.callbacks import Progress
from resmaster_stages.library.opened import FinishedSample, OpenedDataset, finished_samples
from resmaster_stages.planning.checks import check_stages
from resmaster_stages.progress import Event, SampleDone, ShardDone, ShardStarted, listening
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.publish import publish
from resmaster_stages.redaction import one_line
from resmaster_stages.runner.retrying import retried
from resmaster_stages.runner.run import run_stage
from resmaster_stages.runner.shards import TriedShard, each_shard

SHOWN_SHARDS = 10


@dataclass(frozen=True)
class BuiltShard:
    """A shard after the work on it."""

    shard: int
    samples: int
    """Samples that are planned in the shard."""
    samples_ok: int
    """Samples that every stage has made."""
    seconds: float
    """Compute time of its stages."""
    error: str = ""
    """Why the shard is not finished; "" if it is."""


class BuildIncomplete(ResMasterError):
    """Shards or too many samples are missing. What is done is kept, and `build` tries the missing shards again."""

    def __init__(self, message: str, dataset: OpenedDataset, errors: Mapping[int, str]) -> None:
        super().__init__(message)
        self.dataset = dataset
        """What there is."""
        self.errors = dict(errors)
        """Number of each shard that is not finished -> its error."""


def build(
    config: str | Path | Mapping[str, Any] | DatasetConfig,
    *,
    on_sample: Callable[[FinishedSample], object] | None = None,
    on_shard: Callable[[BuiltShard], object] | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> OpenedDataset:
    """Build the dataset that `config` describes, or go on with it, in this process. Returns the dataset, opened.

    config: a YAML or JSON file, a dictionary, or what `load_config` gave. overrides: values of keys at the top.
    on_sample: called with each sample of a shard that this call worked on, when every stage of the shard is committed.
    The sample is read back, with its images. on_shard: called after each of these shards, finished or not. progress:
    called with (samples done, samples in all), counted once per stage. All of them are called in the caller's thread.

    Prefect is neither used nor started. A KeyboardInterrupt (the stop button of a notebook) and an error of a callback
    end the build at once, and what is done is kept: the same call goes on.

    Raises ConfigError for a wrong configuration before anything is written, and BuildIncomplete, which names the shards
    that could not be finished, after all others are done and published.
    """
    dataset = ingest(_config_of(config, overrides))
    opened, todo = OpenedDataset(dataset), pending(dataset)
    shards = sorted({shard for missing in todo.values() for shard in missing})
    check_stages(dataset.config, [stage for stage, missing in todo.items() if missing], here=True)
    tally = _Tally(progress, dataset, todo)
    errors: dict[int, str] = {}
    with listening(tally.hear), tally.raising():
        for tried in each_shard(dataset, shards, list(dataset.hashes), _ensure):
            if tried.error:
                errors[tried.shard] = tried.error
            chain = read_chain(dataset, tried.shard, known=tried.receipts)
            if on_sample and not tried.error:
                for sample in finished_samples(dataset, tried.shard, chain):
                    on_sample(sample)
            if on_shard:
                on_shard(_built(dataset, tried, chain))
    publish(dataset)
    if message := _lacking(dataset, errors):
        raise BuildIncomplete(message, opened, errors)
    return opened


def _config_of(config: str | Path | Mapping[str, Any] | DatasetConfig, overrides: Mapping[str, Any]) -> DatasetConfig:
    """The configuration that is to be built here. Raises ConfigError."""
    if isinstance(config, str | Path):
        found = load_config(config, **overrides)
    else:
        values = config.model_dump(exclude_unset=True) if isinstance(config, DatasetConfig) else dict(config)
        found = parse_config({**values, **overrides}, "build()")
    if found.dispatch.where not in ("auto", "here"):
        raise ConfigError(
            f"dispatch.where: {found.dispatch.where}, and build() computes here; set it to here, or use: resmaster "
            "run CONFIG"
        )
    return found


def _ensure(dataset: Dataset, stage: str, shard: int, known: Mapping[str, Receipt], number: int) -> Receipt:
    return retried(partial(run_stage, dataset, stage, shard, known=known, number=number), stage)


def _built(dataset: Dataset, tried: TriedShard, chain: Chain) -> BuiltShard:
    samples, receipts = dataset.plan.size(tried.shard), chain.committed.values()
    ok = samples - len(chain.unfinished()) if chain.complete else 0
    seconds = round(sum(receipt.seconds for receipt in receipts), 3)
    return BuiltShard(tried.shard, samples, ok, seconds, tried.error)


def _lacking(dataset: Dataset, errors: Mapping[int, str]) -> str:
    """What is missing after a build, and what to do; "" if nothing is."""
    if not errors:
        return shortfall(dataset, status(dataset))
    first, numbers = next(iter(errors.items())), sorted(errors)
    shown = ", ".join(map(str, numbers[:SHOWN_SHARDS])) + (", ..." if len(numbers) > SHOWN_SHARDS else "")
    return (
        f"{len(errors)} of {dataset.plan.shards} shards are not finished ({shown}); first: shard {first[0]}: "
        f"{one_line(first[1])}; the others are done: mend the cause, and call build() again"
    )


class _Raised(BaseException):
    """Carries an error of a caller's `progress` past those who try a failed shard again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Tally:
    """Tells `progress` how many samples are done, counted once per stage."""

    def __init__(self, progress: Progress | None, dataset: Dataset, todo: Mapping[str, Sequence[int]]) -> None:
        self.progress = progress
        self.total = sum(pending_samples(dataset, todo).values())
        self.due = {(stage, shard) for stage, shards in todo.items() for shard in shards}
        self.committed = self.current = 0

    def hear(self, event: Event) -> None:
        """Count an event of the runner."""
        if isinstance(event, ShardStarted):
            self.current = 0
        elif isinstance(event, SampleDone):
            self.current += 1
        elif isinstance(event, ShardDone) and (event.stage, event.shard) in self.due:
            self.committed, self.current = self.committed + event.samples, 0
        else:
            return
        if self.progress:
            try:
                self.progress(min(self.committed + self.current, self.total), self.total)
            except Exception as error:
                raise _Raised(error) from error

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raises what `progress` raised within the block."""
        try:
            yield
        except _Raised as raised:
            raise raised.error from None
