"""All stages over many shards, one shard after the other.

Invariants:
- A shard that fails does not stop the other shards.
- A lost GPU or a wrong configuration ends the work at once, because every other shard would fail the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.retry import Retries, number_of
from resmaster_stages.errors import ConfigError, GpuLost, ShardError
from resmaster_stages.progress import ShardFailed, emit
from resmaster_stages.redaction import one_line

Ensure = Callable[[Dataset, str, int, Mapping[str, Receipt], int], Receipt]
"""(dataset, stage, shard, records of the stages before, number of the attempt) -> the stage's record. It raises what
`runner.run.ensure_stage` raises."""


@dataclass(frozen=True)
class TriedShard:
    """A shard after all of its stages, or after the first one that failed."""

    shard: int
    receipts: Mapping[str, Receipt]
    """Stage -> its commit record, for the stages that are committed."""
    error: str = ""
    """Stage and error, if one failed."""


def each_shard(
    dataset: Dataset, shards: Sequence[int], stages: Sequence[str], ensure: Ensure, retries: Retries | None = None
) -> Iterator[TriedShard]:
    """Run `stages` over each of `shards`. Raises GpuLost and ConfigError at once.

    retries: stage -> shard -> number of the attempt that the shard's failed samples are to get.
    """
    for shard in shards:
        known: dict[str, Receipt] = {}
        failed = ""
        for stage in stages:
            try:
                known[stage] = ensure(dataset, stage, shard, known, number_of(retries, stage, shard))
            except (GpuLost, ConfigError):
                raise  # the next shard would end the same way
            except Exception as error:
                failed = f"{stage}: {error if isinstance(error, ShardError) else describe(error)}"
                emit(ShardFailed(shard, failed))
                break
        yield TriedShard(shard, known, failed)


def describe(error: Exception) -> str:
    """An error with its class, in one line."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
