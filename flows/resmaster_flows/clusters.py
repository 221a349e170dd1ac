"""Processes the shards of a build on an existing Dask or Ray cluster: `--executor dask` or `ray`.

Prefect workers are the usual way (`resmaster_flows.dispatch`); this module is for teams that already have such a
cluster. The environment variable DASK_SCHEDULER_ADDRESS or RAY_ADDRESS gives the cluster's address. The cluster's
processes must have this project installed and must reach the store and the Prefect server. They keep their models from
shard to shard.
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.settings import get_current_settings
from prefect.task_runners import TaskRunner

from resmaster_flows.outcome import incomplete, outcome
from resmaster_flows.process import failures
from resmaster_flows.watch.events import Dispatched
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.retry import Retries, part_of
from resmaster_stages.errors import ConfigError, GpuLost, ShardError, UserError
from resmaster_stages.progress import ShardFailed, emit
from resmaster_stages.runner.shards import describe
from resmaster_tasks.shards import process_shard

Executor = Literal["dask", "ray"]
ADDRESSES: dict[Executor, str] = {"dask": "DASK_SCHEDULER_ADDRESS", "ray": "RAY_ADDRESS"}
"""Executor -> environment variable that holds the cluster's address."""
CONNECT_SECONDS = 10
"""Timeout of the first connection to a Dask scheduler."""


def check(executor: Executor) -> str:
    """The cluster's address. Raises UserError if the extra, the address or the Prefect server is missing."""
    if importlib.util.find_spec(f"prefect_{executor}") is None:
        raise UserError(
            f"executor {executor} needs prefect-{executor}; install it with: pip install "
            f"'resmaster-pipeline[{executor}]'"
        )
    address = os.environ.get(ADDRESSES[executor], "").strip()
    if not address:
        raise UserError(f"executor {executor}: set {ADDRESSES[executor]} to the address of your cluster")
    if get_current_settings().api.url is None:
        raise UserError(f"executor {executor}: set PREFECT_API_URL to a server that the cluster reaches (make up)")
    return address


def connect(executor: Executor) -> str:
    """The cluster's address. Raises UserError as `check` does, and if the cluster does not answer."""
    address = check(executor)
    if executor == "dask":
        import distributed

        try:
            distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise UserError(f"{ADDRESSES[executor]}={address}: no Dask scheduler answers there ({error})") from None
        return address
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"{ADDRESSES[executor]}={address}: no Ray cluster answers there ({error})") from None
    return address


def runner(executor: Executor) -> TaskRunner[Any]:
    """Prefect's task runner on the cluster. Raises UserError as `connect` does."""
    address = connect(executor)
    if executor == "dask":
        from prefect_dask import DaskTaskRunner

        return DaskTaskRunner(address=address)
    from prefect_ray import RayTaskRunner

    return RayTaskRunner(address=address)


def resources(executor: Executor) -> AbstractContextManager[Any]:
    """The resources of one task: on Ray one GPU if the cluster has any, and a process that is kept afterwards."""
    if executor == "dask":
        return nullcontext()
    import ray
    from prefect_ray.context import remote_options

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    return remote_options(
        num_gpus=gpus, max_calls=0
    )  # 0: by default Ray ends a process, with its models, after one GPU task


def process_on_cluster(
    dataset: Dataset,
    shards: Sequence[int],
    stages: Sequence[str] | None,
    retries: Retries | None,
    executor: Executor,
) -> dict[str, str]:
    """Process the shards on the cluster. Returns shard number -> error, for each shard that could not be finished."""
    run = _process.with_options(task_runner=runner(executor))
    errors: dict[str, str] = outcome(
        run(dataset.url, list(shards), list(stages) if stages else None, retries, executor, return_state=True)
    )
    return errors


@flow(name="process-shards-on-cluster", validate_parameters=False)
def _process(
    dataset_url: str, shards: list[int], stages: list[str] | None, retries: Retries | None, executor: Executor
) -> dict[str, str] | State[dict[str, str]]:
    """Run every stage over the shards, with one task per shard and at most `dispatch.window` tasks at a time."""
    dataset = open_dataset(dataset_url)
    chosen = [stage for stage in dataset.hashes if stages is None or stage in stages]
    errors: dict[str, str] = {}
    under_way: deque[tuple[int, PrefectFuture[int]]] = deque()
    due = deque(shards)
    with resources(executor):
        while due or under_way:
            while due and len(under_way) < dataset.config.dispatch.window:
                shard = due.popleft()
                under_way.append((shard, process_shard.submit(dataset_url, shard, chosen, part_of(retries, [shard]))))
            shard, future = under_way.popleft()
            try:
                future.result()
            except (GpuLost, ConfigError):
                raise  # the next shard would end the same way
            except Exception as error:
                errors[str(shard)] = str(error) if isinstance(error, ShardError) else describe(error)
                emit(ShardFailed(shard, errors[str(shard)]))
            done = len(shards) - len(due) - len(under_way) - len(errors)
            emit(Dispatched(done, len(shards), len(under_way), len(due)))
    return incomplete(failures(errors), errors) if errors else errors
