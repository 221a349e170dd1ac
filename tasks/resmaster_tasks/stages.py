"""The stage tasks: one task run is one stage over one shard. It is never one image, as a task run costs about 11 ms.

Tasks carry no tags: for every tag Prefect asks its server for a concurrency slot, which took a second per task run. A
task run that had nothing to do ends in the state Cached. The dataset's commits decide that, not Prefect's database, so
it holds in any flow run and on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run, task_run
from prefect.states import Completed
from prefect.tasks import Task

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.redaction import no_secrets_in_errors
from resmaster_stages.runner.run import ensure_stage
from resmaster_tasks.policy import RETRIES, RETRY_DELAYS_SECONDS, RETRY_JITTER, worth_retrying


def run_facts() -> dict[str, Any]:
    """Ids and name of the current flow run and task run, for the commit record. `resmaster explain` shows them."""
    return {"flow_run": flow_run.id, "flow_run_name": flow_run.name, "task_run": task_run.id}


@cache
def stage_task(stage: str) -> Task[..., Receipt | State[Receipt]]:
    """The task of a stage. Its parameters (dataset, shard, known, number) are those of `ensure_stage`.

    Call the task with `return_state=True`: the result of the state, which may be the state Cached, is the receipt.
    """

    @task(
        name=stage,
        task_run_name=f"{stage} {{shard:06d}}",
        description=f"The {stage} stage over one shard; returns at once if the shard is committed.",
        retries=RETRIES,
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=worth_retrying,
        cache_policy=NO_CACHE,  # the commit records are the cache
        persist_result=False,
    )
    def run(dataset: Dataset, shard: int, known: Mapping[str, Receipt], number: int) -> Receipt | State[Receipt]:
        with no_secrets_in_errors():  # Prefect keeps and shows what a task raises
            receipt, worked = ensure_stage(dataset, stage, shard, known=known, number=number, provenance=run_facts())
        return receipt if worked else Completed(name="Cached", data=receipt)

    return run
