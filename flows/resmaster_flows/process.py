"""Flow `process-shards`: in one process on one device, one task run per shard and stage.

Invariants:
- A shard that fails does not stop the other shards. At the end the flow run fails and lists the failed shards.
- A lost GPU or a wrong configuration ends the flow run at once, because every other shard would fail the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from resmaster_flows.calls import call
from resmaster_flows.outcome import incomplete
from resmaster_flows.plugins import load_plugins
from resmaster_flows.selection import spell_shards
from resmaster_flows.watch.artifacts import run_page
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.retry import Retries
from resmaster_stages.planning.checks import check_stages
from resmaster_stages.runner.shards import each_shard
from resmaster_tasks.stages import stage_task

load_plugins()

NAME_CHARACTERS = 60
"""Maximum length of the list of shards in a run's name."""


def run_name(dataset_url: str, shards: Sequence[int], stages: Sequence[str] | None = None) -> str:
    """The name of a run: `demo: shards 0-7`, or `demo: captions,quality of shards 0-7` if stages are chosen."""
    chosen = f"{','.join(stages)} of " if stages is not None else ""
    spelled = spell_shards(shards)
    if len(spelled) > NAME_CHARACTERS:
        spelled = f"{spelled[:NAME_CHARACTERS].rpartition(',')[0]},... ({len(shards)} in all)"
    return f"{dataset_url.rstrip('/').rpartition('/')[2]}: {chosen}shards {spelled}"


def _own_run_name() -> str:
    parameters = flow_run.parameters
    return run_name(parameters["dataset_url"], parameters["shards"], parameters.get("stages"))


@flow(name="process-shards", flow_run_name=_own_run_name, validate_parameters=False)
def process_shards(
    dataset_url: str, shards: list[int], stages: list[str] | None = None, retries: Retries | None = None
) -> dict[str, str] | State[dict[str, str]]:
    """Run every stage over the shards. A stage that is already committed returns at once.

    Args:
        dataset_url: folder or URL of the dataset (the folder that holds config.json).
        shards: shard numbers, as in the plan.
        stages: only these stages, in pipeline order; default: all that the dataset needs.
        retries: stage -> shard -> number of the attempt that the shard's failed samples are to get.

    Returns shard number -> first error, for each failed shard. If there are failed shards, the flow run ends as
    `Incomplete`. Raises GpuLost and ConfigError at once.
    """
    dataset = open_dataset(dataset_url)
    chosen = [stage for stage in dataset.hashes if stages is None or stage in stages]
    check_stages(dataset.config, chosen, here=True)  # of this machine's devices and files, before the first stage
    with run_page(dataset, dict.fromkeys(chosen, shards), part=True):
        tried = each_shard(dataset, shards, chosen, _as_task, retries)
        errors = {str(each.shard): each.error for each in tried if each.error}
    if errors:
        return incomplete(failures(errors), errors)
    return errors


def _as_task(dataset: Dataset, stage: str, shard: int, known: Mapping[str, Receipt], number: int) -> Receipt:
    receipt: Receipt = call(stage_task(stage), dataset, shard, known, number)
    return receipt


def failures(errors: dict[str, Any]) -> str:
    """The message of a flow run that could not finish some shards."""
    first = next(iter(errors.values()))
    return f"shards {spell_shards(int(shard) for shard in errors)} not finished; first: {first}"
