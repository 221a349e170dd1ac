"""Decides whether a dataset whose shards are finished lacks too many samples. The exit status of the command line and
the final state of a flow run follow this decision."""

from __future__ import annotations

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.failures import failures
from resmaster_stages.inspection.status import Status
from resmaster_stages.redaction import quoted


def shortfall(dataset: Dataset, found: Status) -> str:
    """One line that says that too many samples of the dataset failed, and what to do; "" if it is not so.

    A shard may always lose one sample, so small shards may all be finished though most samples failed. The whole
    dataset may lose as many as a shard of its size, and not all. found: its status.
    """
    failed = sum(stage.samples_failed for stage in found.stages)
    most = min(dataset.config.tolerated(found.samples), found.samples - 1)
    if failed <= most:
        return ""
    told = failures(dataset)
    why = f"to see why: {told[0]['command']}; " if told else ""
    return (
        f"{failed} of {found.samples} samples failed (tolerated: {most}); {why}mend the cause, then try them again "
        f"with: resmaster repair {quoted(dataset.url)} --retry-errors"
    )
