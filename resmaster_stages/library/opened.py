"""`open`: the finished samples of a dataset, its status, and what is known of each sample.

The function has the name of a builtin, as `gzip.open` has, so this module opens no files itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.chain import Chain, read_chain, read_chains
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.reading import ShardSamples, chosen_samples
from resmaster_stages.dataset.sample import EncodedImage
from resmaster_stages.errors import UserError

if TYPE_CHECKING:
    from resmaster_stages.dataset.plan import PlannedSample
    from resmaster_stages.inspection.explain import Explanation
    from resmaster_stages.inspection.status import Status


class UnknownKey(UserError, KeyError):
    """No finished sample of the dataset has this key."""

    def __str__(self) -> str:  # a KeyError would show its message in quotes
        return str(self.args[0])


@dataclass(frozen=True)
class FinishedSample:
    """A sample that every stage has made."""

    key: str
    index: int
    """Position in the dataset's plan."""
    prompt: str
    negative_prompt: str
    """The prompt's own negative prompt; "" if it has none."""
    source: str | None
    """Where the user's own image is; None for an image that was made from a prompt."""
    low_res: EncodedImage
    """`low_res.open()` is a PIL image, `low_res.data` the file's bytes, `low_res.meta` its facts: seed, model, ..."""
    high_res: EncodedImage
    captions: tuple[dict[str, Any], ...]
    """Rows of the captions table; () if the method reads no captions."""
    metrics: dict[str, Any]
    """The row of the quality table: metrics by name, and flags."""
    take: int = 0
    """How often the sample was made again with a new seed."""


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset in a folder or a bucket. What is finished is looked up anew at each use, so it may still be built."""

    dataset: Dataset

    @property
    def url(self) -> str:
        """The dataset's folder or URL."""
        return self.dataset.url

    @property
    def config(self) -> DatasetConfig:
        """The current configuration."""
        return self.dataset.config

    def status(self) -> Status:
        """How far each stage is, and whether readers get what is committed."""
        from resmaster_stages.inspection.status import status

        return status(self.dataset)

    def explain(self, key: str) -> Explanation:
        """All that is known of one sample: seeds, weights, each stage's commit, failures, places of its files.

        key: a key, or a beginning that no other key has. Raises KeyError.
        """
        from resmaster_stages.inspection.explain import explain

        return explain(self.dataset, self._planned(key).key)

    def __len__(self) -> int:
        """How many samples are finished. Reads a record per shard and stage."""
        return sum(self.dataset.plan.size(shard) - len(chain.unfinished()) for shard, chain in self._chains())

    def __iter__(self) -> Iterator[FinishedSample]:
        """The finished samples, in the plan's order. Every object is checked against its commit record.

        Raises PlanError if there is no plan yet, and ShardError if an object is gone or damaged.
        """
        for shard, chain in self._chains():
            yield from finished_samples(self.dataset, shard, chain)

    def __getitem__(self, key: str) -> FinishedSample:
        """The finished sample with this key, or with a key of which this is the beginning.

        Raises KeyError if there is none, or several, or if the sample is not finished, and ShardError if an object is
        gone or damaged.
        """
        planned = self._planned(key)
        chain = read_chain(self.dataset, planned.shard)
        if chain.complete:
            others = {each.key for each in self.dataset.plan.read(planned.shard)} - {planned.key}
            for sample in finished_samples(self.dataset, planned.shard, chain, others):
                return sample
        raise UnknownKey(f"{self.url}: sample {planned.key} is planned, but not finished; explain({key!r}) says why")

    def _planned(self, key: str) -> PlannedSample:
        from resmaster_stages.inspection.explain import find_sample

        if not isinstance(key, str):
            raise UnknownKey(f"a key is a text, not {type(key).__name__}; list(dataset) gives the samples by number")
        try:
            return find_sample(self.dataset, key)
        except UserError as error:
            raise UnknownKey(str(error)) from None

    def _chains(self) -> Iterator[tuple[int, Chain]]:
        """The shards that every stage has committed, in order, and their records."""
        committed = (self.dataset.commits(stage).numbers().keys() for stage in self.dataset.hashes)
        left = set.intersection(*map(set, committed))
        for shard, chain in read_chains(self.dataset, sorted(left)):
            left.remove(shard)
            yield shard, chain
        for shard in sorted(left):
            read_chain(self.dataset, shard)  # a record is damaged: this raises, and says what to do


def finished_samples(
    dataset: Dataset, shard: int, chain: Chain, without: Collection[str] = ()
) -> Iterator[FinishedSample]:
    """The finished samples of a shard with the records of `chain`, except the keys in `without`, in the plan's order.

    Raises ShardError if an object is gone or damaged.
    """
    left_out = chain.unfinished().union(without)
    with chosen_samples(dataset, shard, chain, tuple(dataset.hashes), left_out, chain.made()) as samples:
        for place in range(len(samples)):
            yield _finished_sample(samples, place)


def _finished_sample(samples: ShardSamples, place: int) -> FinishedSample:
    sample = samples[place]
    assert sample.low_res is not None
    assert sample.high_res is not None
    return FinishedSample(
        key=sample.key,
        index=sample.index,
        prompt=sample.prompt,
        negative_prompt=sample.negative_prompt,
        source=sample.source,
        low_res=sample.low_res,
        high_res=sample.high_res,
        captions=sample.captions,
        metrics=samples.rows("quality", sample.key)[0],
        take=sample.take,
    )


def open(url: str) -> OpenedDataset:
    """Open the dataset at `url`: its folder, an address such as `s3://bucket/datasets/demo`, or a root with just one.

    `dataset[key]` is a finished sample, iteration gives all of them, and `len(dataset)` counts them. Raises ConfigError
    if there is no dataset, or if there are several.
    """
    return OpenedDataset(open_dataset(url))
