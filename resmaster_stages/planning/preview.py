"""Finds out what a run would do, without writing anything. Of a model, only JSON files and headers are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.chain import redo_left
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import Plan, find_plan
from resmaster_stages.dataset.stages import stages_of
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.inspection.key_lists import KeyList
from resmaster_stages.planning.checks import HERE, Around, check, check_sizes, sampling_of, unguided
from resmaster_stages.planning.drafts import DraftReader, LeftOut
from resmaster_stages.planning.excluding import Excluding
from resmaster_stages.storage.digests import DigestSet
from resmaster_stages.storage.filesystem import open_root


@dataclass(frozen=True)
class StagePreview:
    """The work of one stage."""

    stage: str
    shards_pending: int
    shards_committed: int
    samples_pending: int


@dataclass(frozen=True)
class Few:
    """The inputs that are left out for one reason: their number, and the first ones (up to `KEPT_INPUTS`) in words."""

    count: int
    first: tuple[str, ...]

    @classmethod
    def of(cls, found: LeftOut[Any]) -> Few:
        """What was left out so far."""
        return cls(found.count, tuple(map(str, found.first)))


@dataclass(frozen=True)
class Intake:
    """The samples from the input of a configuration, together with the samples planned before."""

    config: DatasetConfig
    url: str
    """Folder or URL of the dataset."""
    exists: bool
    """Whether the dataset existed before."""
    samples: int
    """Samples in the plan after the run."""
    new_samples: int
    """Samples of these that were not in the plan before."""
    shards: int
    duplicates: Few
    """Inputs that equal an earlier input."""
    rejected: Few
    """Inputs that cannot be used: place, reason, text."""
    lone_texts: str
    """What is to be said of texts that belong to no image; "" if there are none."""
    noticed: str
    """What is to be said of what images say themselves; "" if nothing."""

    def headline(self) -> str:
        """The intake in one line."""
        notes = [f"{self.config.upscale.method}, {_spell_size(self.config)}"]
        if self.exists:
            notes.append(f"continues, {self.new_samples} new" if self.new_samples else "continues")
        if repeated := self.duplicates.count:
            notes.append(f"{repeated} duplicate{'s' if repeated > 1 else ''} left out")
        if self.rejected.count:
            notes.append(f"{self.rejected.count} rejected")
        notes += filter(None, (self.lone_texts, self.noticed))
        return f"{self.config.name}: {self.samples} samples in {self.shards} shards ({'; '.join(notes)}) at {self.url}"


@dataclass(frozen=True)
class Preview(Intake):
    """What a run would do."""

    typical_px: tuple[int, int]
    """Low-res (height, width) of the median sample by area."""
    stages: tuple[StagePreview, ...]
    unchecked: tuple[str, ...] = ()
    """Settings whose models are not on this machine yet, so that nothing is known of them."""
    notes: tuple[str, ...] = ()
    """What a user should know, although it is no mistake."""

    def pending_samples(self) -> dict[str, int]:
        """Stage -> samples that are still to do."""
        return {stage.stage: stage.samples_pending for stage in self.stages}


def preview(config: DatasetConfig, around: Around = HERE, exclude: KeyList | None = None) -> Preview:
    """What a run of `config` would do. Raises UserError for mistakes in the configuration or its input.

    around: what is around the run. exclude: samples that are not to be planned.
    """
    checked = check(config, around)
    dataset = checked.dataset
    config = config.keeping(dataset.config) if dataset else config
    planned = Dataset(open_root(config.root).sub(config.name), config)
    plan = find_plan(planned.folder) if dataset else Plan(planned.folder, ())
    known = DigestSet(map(bytes.fromhex, plan.keys()))
    excluding = Excluding(planned.folder, known, exclude)
    draft = DraftReader(config, excluded=excluding.reason)
    sizes, new, negative = Counter[tuple[int, int]](), 0, 0
    for sample in draft:
        negative += bool(sample.negative_prompt)
        sizes[sample.height, sample.width] += 1
        new += bytes.fromhex(sample.key) not in known
    excluding.require()
    shards = plan.shards + -(-new // config.samples_per_shard)

    stages, left = [], redo_left(planned) if dataset and plan.generations else {}
    for stage in planned.hashes:
        committed = planned.commits(stage).numbers() if dataset else {}
        done = sum(plan.size(shard) for shard in committed)
        redo = left.get(stage, {})
        to_do, samples = shards - len(committed) + len(redo), plan.samples + new - done + sum(redo.values())
        stages.append(StagePreview(stage, to_do, len(committed), samples))
    return Preview(
        config=config,
        url=planned.url,
        exists=dataset is not None,
        samples=plan.samples + new,
        new_samples=new,
        shards=shards,
        duplicates=Few.of(draft.duplicates),
        rejected=Few.of(draft.rejected),
        lone_texts=str(draft.lone_texts),
        noticed=str(draft.noticed),
        typical_px=_middle(sizes),
        stages=tuple(stages),
        unchecked=checked.unchecked,
        notes=(*checked.notes, *_unread(config, negative)),
    )


def _unread(config: DatasetConfig, negative: int) -> Iterator[str]:
    """Says it if samples have negative prompts that the base model does not read."""
    deaf, asked = unguided(config), sampling_of(config, stages_of(config))
    if negative and asked and len(deaf) == len(asked):
        who = " and ".join(dict.fromkeys(deaf.values()))
        yield f"negative prompts of {negative} samples: not read, because {who} has no unconditional branch"


def _spell_size(config: DatasetConfig) -> str:
    """The low-res and high-res sizes as text."""
    if config.images:
        return f"your images x {config.upscale.scale:g}"
    height, width = check_sizes(config)
    tall, wide = target_size(height, width, config.upscale.scale)
    return f"{width} x {height} px to {wide} x {tall} px"


def _middle(sizes: Counter[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the median sample by area. `sizes`: number of samples of each size."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    ends = accumulate(sizes[size] for size in ordered)
    return next(size for size, end in zip(ordered, ends) if end > sizes.total() // 2)
