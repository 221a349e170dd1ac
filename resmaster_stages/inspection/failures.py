"""Names the samples that are still missing because they failed. Reads ledgers and commit records."""

from __future__ import annotations

from typing import Any

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.inspection.explain import explain_command


def failures(dataset: Dataset) -> list[dict[str, Any]]:
    """The ledger rows of samples that are still missing under the current configuration.

    Only the last attempt of each sample and stage, with a command that explains the sample.
    """
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in dataset.hashes:
        commits = dataset.commits(stage)
        rows = ledger_rows(commits)
        numbers = commits.numbers() if rows else {}
        shards = numbers.keys() & {row["shard"] for row in rows}
        committed = commits.read_many({shard: numbers[shard] for shard in shards})
        for row in rows:
            if row["shard"] in committed and row["key"] not in committed[row["shard"]].failed_keys:
                continue
            known = last.get((stage, row["key"]))
            if known is None or row["attempt_number"] >= known["attempt_number"]:
                last[stage, row["key"]] = row
    return [{**row, "command": explain_command(dataset.url, row["key"])} for row in last.values()]
