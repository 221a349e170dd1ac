"""Stage 1: turns prompts, or the user's own images, into an immutable plan of samples.

The input is a .txt file (one prompt per line), a .csv, .jsonl or .parquet file (column `prompt`, optional
`negative_prompt` and `detail_mask`), or images with prompts and detail masks beside them.

Invariants:
- A file that cannot be read raises a UserError that names file and line. A single bad prompt is rejected with a reason.
- The same prompts give the same keys in the same order, whatever was planned before. Planned samples stay planned, and
  excluded ones are never planned.
"""

from __future__ import annotations

import logging

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import RACES, Dataset, create_or_open
from resmaster_stages.dataset.plan import GenerationWriter, Plan, find_plan
from resmaster_stages.errors import PlanError
from resmaster_stages.inspection.key_lists import KeyList
from resmaster_stages.planning.checks import HERE, Around, check
from resmaster_stages.planning.drafts import DraftReader
from resmaster_stages.planning.excluding import Excluding
from resmaster_stages.planning.preview import Few, Intake
from resmaster_stages.progress import Planned, emit
from resmaster_stages.storage.digests import DigestSet
from resmaster_stages.storage.filesystem import open_root

log = logging.getLogger(__name__)


def ingest(config: DatasetConfig, around: Around = HERE, exclude: KeyList | None = None) -> Dataset:
    """Create or open the dataset of `config`, and plan all samples that `config` asks for.

    Emits one line (`progress.Planned`) about what was planned. A second call changes nothing. Samples that the source
    no longer gives stay planned.
    around: what is around the run. exclude: samples that are not planned now and never will be; the dataset keeps the
    list.
    Raises UserError for a wrong configuration or source; then nothing has been written.
    """
    existing = check(config, around).dataset
    config = config.keeping(existing.config) if existing else config
    folder = existing.folder if existing else open_root(config.root).sub(config.name)
    for _ in range(RACES):
        plan = find_plan(folder) if existing else Plan(folder, ())
        if plan.generations and not config.prompts and not config.images:
            return create_or_open(config, existing)
        known, kept = DigestSet(map(bytes.fromhex, plan.keys())), 0
        excluding = Excluding(folder, known, exclude)
        with GenerationWriter(plan, config.samples_per_shard) as writer:
            draft = DraftReader(config, writer.reject, writer.repeat, excluding.reason)
            for sample in draft:
                if bytes.fromhex(sample.key) in known:
                    kept += 1
                else:
                    writer.add(sample)
            if gone := len(known) - kept:
                log.warning("%s: %d planned samples are no longer asked for; the plan keeps them", folder.url, gone)
            excluding.require()
            dataset = create_or_open(config, existing)  # after the whole source was read without an error
            excluding.keep()
            if not writer.samples or writer.commit():
                intake = Intake(
                    config=config,
                    url=folder.url,
                    exists=existing is not None,
                    samples=plan.samples + writer.samples,
                    new_samples=writer.samples,
                    shards=plan.shards + -(-writer.samples // config.samples_per_shard),
                    duplicates=Few.of(draft.duplicates),
                    rejected=Few.of(draft.rejected),
                    lone_texts=str(draft.lone_texts),
                    noticed=str(draft.noticed),
                )
                emit(Planned(intake.headline()))
                return dataset
        existing = dataset
    raise PlanError(f"{folder.url}: other processes keep planning the same dataset; run one at a time")
