"""One task for all stages of one shard: the unit of work on somebody else's cluster, where tasks have no order.

Invariant: a process does one shard at a time, whatever number of threads the cluster gives it: models are not
thread-safe, and one process holds one device.
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resmaster_stages.config.dataset import Stage
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.redaction import no_secrets_in_errors
from resmaster_stages.runner.run import run_stage
from resmaster_tasks.alone import alone
from resmaster_tasks.policy import RETRIES, RETRY_DELAYS_SECONDS, RETRY_JITTER, worth_retrying
from resmaster_tasks.stages import run_facts


@task(
    name="shard",
    task_run_name="shard {shard:06d}",
    description="All stages of one shard; returns at once where they are committed.",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=RETRY_JITTER,
    retry_condition_fn=worth_retrying,
    cache_policy=NO_CACHE,  # the commit records are the cache
)
def process_shard(dataset_url: str, shard: int, stages: list[Stage]) -> int:
    """Returns how many samples of the shard passed the last of `stages`."""
    with no_secrets_in_errors(), alone():
        dataset = open_dataset(dataset_url)
        receipts = [run_stage(dataset, dataset.config, stage, shard, provenance=run_facts()) for stage in stages]
        return receipts[-1].samples_ok
