"""The stage tasks. One task run is one stage over one shard, never one image: a task run costs about 11 ms.

Tasks carry no tags: for every tag Prefect asks its server for a concurrency slot, which took a second per task run.
The task's answer is the shard's receipt as plain JSON values, so that a result store needs no pickle.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.runtime import flow_run, task_run
from prefect.tasks import Task

from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.redaction import no_secrets_in_errors
from resmaster_stages.runner.run import run_stage
from resmaster_tasks.policy import RETRIES, RETRY_DELAYS_SECONDS, RETRY_JITTER, worth_retrying
from resmaster_tasks.results import CommitRecords, cache_key_of_task


def run_facts() -> dict[str, Any]:
    """The Prefect runs at work, for the commit record: it outlives them, and `resmaster explain` names them."""
    return {"flow_run": flow_run.id, "flow_run_name": flow_run.name, "task_run": task_run.id}


def _stage_task(stage: str) -> Task[..., dict[str, Any]]:
    @task(
        name=stage,
        task_run_name=f"{stage} {{shard:06d}}",
        description=f"The {stage} stage over one shard; returns at once if the shard is committed.",
        retries=RETRIES,
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=worth_retrying,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=cache_key_of_task),
        result_serializer="json",
        cache_result_in_memory=False,
    )
    def run(dataset_url: str, shard: int) -> dict[str, Any]:
        with no_secrets_in_errors():  # Prefect keeps and shows what a task raises
            dataset = open_dataset(dataset_url)
            return run_stage(dataset, dataset.config, stage, shard, provenance=run_facts()).to_json()

    run.result_storage = (
        CommitRecords()
    )  # the decorator takes only blocks that a server keeps; this one has nothing to keep
    return run


STAGE_TASKS: dict[str, Task[..., dict[str, Any]]] = {stage: _stage_task(stage) for stage in STAGES}
"""Stage name -> task with parameters (dataset_url, shard)."""
