"""Stage 1: prompts, or the user's own images, become an immutable plan of samples.

Reads .txt (one prompt per line), .csv, .jsonl and .parquet (column `prompt`, optional `negative_prompt` and
`detail_mask`), and images with what lies beside them.
Knows nothing about what is made of them.

Invariants:
- A file that cannot be read at all is a UserError that names file and line; a single bad prompt is rejected with a
  reason.
- The same prompts give the same keys in the same order, whatever was planned before; what is planned stays planned.
"""

from __future__ import annotations

import logging

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import RACES, Dataset
from resmaster_stages.dataset.plan import GenerationWriter, Plan, find_plan
from resmaster_stages.errors import PlanError
from resmaster_stages.planning.drafts import DraftReader
from resmaster_stages.storage.digests import DigestSet

log = logging.getLogger(__name__)


def ingest(dataset: Dataset, config: DatasetConfig) -> Plan:
    """Plan all samples that `config` asks for and the dataset does not have yet; a second call changes nothing.

    Samples that the source no longer gives stay planned. Raises UserError for a source that cannot be read.
    """
    plan = find_plan(dataset.folder)
    if plan.generations and not config.prompts and not config.images:
        return plan
    for _ in range(RACES):
        draft, known, kept = DraftReader(config), DigestSet(map(bytes.fromhex, plan.keys())), 0
        with GenerationWriter(plan, config.samples_per_shard) as writer:
            for sample in draft:
                if bytes.fromhex(sample.key) in known:
                    kept += 1
                else:
                    writer.add(sample)
            if gone := len(known) - kept:
                log.warning("%s: %d planned samples are no longer asked for; the plan keeps them", dataset.url, gone)
            if not writer.samples:
                return plan
            won = writer.commit(draft.rejected, draft.duplicates)
        plan = find_plan(dataset.folder)
        if won:
            log.info("%s: planned %d new samples, %d rejected", dataset.url, writer.samples, len(draft.rejected))
            return plan
    raise PlanError(f"{dataset.url}: other processes keep planning the same dataset; run one at a time")


# ----------------------------------------------------------------------------------------------------------------------
# files
