"""Asks for another attempt at the failed samples of committed shards."""

from __future__ import annotations

import json
from collections.abc import Sequence

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.chain import read_chains
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.stages import stage_hashes


def request_retries(
    dataset: Dataset,
    config: DatasetConfig | None = None,
    *,
    shards: Sequence[int] | None = None,
    stages: Sequence[Stage] | None = None,
) -> int:
    """Ask for another attempt at every failed sample of committed shards, of `shards` and `stages` (default: all).

    Returns the number of samples. A request that waits for its answer is not repeated.
    """
    hashes, count = stage_hashes(config or dataset.config), 0
    for shard, chain in read_chains(dataset.folder, hashes, read_plan(dataset.folder).shards):
        if shards is not None and shard not in shards:
            continue
        for stage, link in chain.links.items():
            if not link.failed or (stages is not None and stage not in stages):
                continue
            count += len(link.failed)
            if not link.asked:
                name = layout.retry_request(stage, hashes[stage], shard, link.requests + 1)
                try:
                    dataset.folder.create(name, (json.dumps({"keys": sorted(link.failed)}) + "\n").encode())
                except FileExistsError:
                    continue  # somebody else asked just now
    return count
