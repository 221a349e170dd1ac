"""One task for all stages of one shard: the unit of work on a Dask or Ray cluster, where tasks run in no fixed order.

Invariant: a process does one shard at a time, however many threads the cluster gives it, because models are not
thread-safe and one process holds one device.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.retry import Retries, number_of
from resmaster_stages.inspection.limits import Limits, known_spending
from resmaster_stages.planning.checks import check_stages
from resmaster_stages.redaction import no_secrets_in_errors
from resmaster_stages.runner.run import run_stage
from resmaster_tasks.alone import alone
from resmaster_tasks.policy import RETRIES, RETRY_DELAYS_SECONDS, RETRY_JITTER, worth_retrying
from resmaster_tasks.stages import run_facts


@task(
    name="shard",
    task_run_name="shard {shard:06d}",
    description="All stages of one shard; returns at once where they are committed, or if a limit is reached.",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=RETRY_JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,  # the commit records are the cache
)
def process_shard(
    dataset_url: str, shard: int, stages: list[str], retries: Retries | None = None, until: str | None = None
) -> str:
    """Run `stages` over the shard, unless a limit of the build is reached. Returns which limit, in words, or "".

    until: time (ISO 8601) after which no shard is begun.
    """
    with no_secrets_in_errors(), alone():
        dataset = open_dataset(dataset_url)
        if limit := Limits(dataset, until, known_spending(dataset.url, flow_run.id)).reached():
            return limit
        check_stages(dataset.config, stages, here=True)  # of this machine's devices and files, before the first stage
        known: dict[str, Receipt] = {}
        for stage in stages:
            number = number_of(retries, stage, shard)
            known[stage] = run_stage(dataset, stage, shard, known=known, number=number, provenance=run_facts())
        return ""
