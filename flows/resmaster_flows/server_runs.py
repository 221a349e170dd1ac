"""Submits, watches and cancels flow runs of the deployment `process-shards` on a Prefect server.

This module does not track which shards are finished: `resmaster_flows.dispatch` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkerFilter,
    WorkerFilterStatus,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.events.filters import EventFilter
from prefect.exceptions import ObjectNotFound, Pause
from prefect.logging import get_run_logger
from prefect.runtime import deployment as own_deployment
from prefect.runtime import flow_run as own_run
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Cancelling, Crashed, Scheduled, Suspended
from prefect.utilities.urls import url_for

from resmaster_flows.deployments import shards_beside
from resmaster_flows.dispatch import Shards, Stopped
from resmaster_flows.process import run_name
from resmaster_flows.watch.events import Decision
from resmaster_flows.workplace import on_workers
from resmaster_stages.config.dataset import DatasetConfig, DispatchConfig
from resmaster_stages.dataset.retry import Retries, part_of
from resmaster_stages.errors import UserError
from resmaster_stages.inspection.limits import Limits
from resmaster_stages.keys import digest
from resmaster_stages.progress import emit
from resmaster_stages.storage.filesystem import open_root

FLOW = "process-shards"
BUILDS = ("build-dataset", "repair")
"""The flows that process whole datasets."""
DATASET_LABEL = "resmaster.dataset"
"""Label of a build's flow run: the URL of its dataset."""
SILENT_SECONDS = 120.0
"""A build of which the server has heard nothing for this time is dead. Runs send a heartbeat every 30 s."""
BUILDS_QUEUE = "builds"
"""Work queue of builds and repairs. Workers whose names have this word take no runs over shards."""
REPAIR_QUEUE = "gpu-repair"
"""Work queue of repairs. Workers take runs from this queue before runs from the queue of builds."""

WAITING = "Waiting"
"""State of a run that waits for a worker: scheduled, under a name that Prefect does not turn into Late. A healthy build
has many such runs for hours."""
HELD_BACK = timedelta(seconds=30)
"""A new run is due so much later until it has that state, so that no worker takes it in between. Workers look 10 s
ahead."""
PAGE = 200
"""Runs per request to the server."""
BULK = 50
"""Runs whose state one request sets at most."""


def deployed(config: DispatchConfig) -> DeploymentResponse:
    """The deployment whose runs process the shards. Raises UserError if server or deployment does not exist."""
    api, name = get_current_settings().api.url, f"{FLOW}/{config.deployment or shards_beside(own_deployment.name)}"
    if api is None:
        raise UserError("dispatch.where is workers, but no server is configured: set PREFECT_API_URL (make up)")
    with get_client(sync_client=True) as client:
        try:
            return client.read_deployment_by_name(name)
        except ObjectNotFound:
            raise UserError(
                f"{api}: has no deployment {name}; make it with: make deploy (or unset PREFECT_API_URL to do the work "
                "in this process)"
            ) from None


class ServerRuns:
    """The runs of one build. Implements `dispatch.Runs`; must be created inside the build's flow run."""

    def __init__(
        self,
        config: DispatchConfig,
        dataset_url: str,
        stages: list[str] | None = None,
        retries: Retries | None = None,
        queue: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """queue: work queue; default: the deployment's. limits: of the build.

        Raises UserError if server or deployment does not exist.
        """
        self._deployed = deployed(config)
        self._dataset_url = dataset_url
        self._stages = stages
        self._retries = retries
        self._queue = queue
        self._limits = limits
        context = FlowRunContext.get()
        if context is None or context.flow_run is None or context.flow_run.state is None:
            raise RuntimeError("runs over shards belong to a build's flow run, and there is none")
        self._build: UUID = context.flow_run.id
        self._begun: UUID = context.flow_run.state.id
        """Id of the state Running that this process has set. A retry or a resume sets another."""

    def places(self) -> int:
        """How many runs can be at work at the same time, as `Runs.places` describes.

        The limit of the queue (`make deploy GPUS=8`), or else the workers of the pool that are online.
        """
        pool, queue = self._deployed.work_pool_name, self._queue or self._deployed.work_queue_name
        if pool is None:  # a process serves the deployment without a pool
            return 1
        online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE.value]))
        place = {"work_pool_name": pool, "name": queue}
        with get_client(sync_client=True) as client:
            found = client.request("GET", "/work_pools/{work_pool_name}/queues/{name}", path_params=place)
            workers = client.read_workers_for_work_pool(pool, online)
        for_shards = [worker for worker in workers if BUILDS_QUEUE not in worker.name.split("-")]
        if not for_shards:
            emit(Decision(f"no worker of the pool {pool} is online that takes shards: the runs wait for one"))
        return max(1, found.json()["concurrency_limit"] or len(for_shards))

    def begun(self) -> Mapping[UUID, tuple[str, Shards]]:
        """The runs of an earlier process of this build, as `Runs.begun` describes: before a retry or a suspension."""
        with get_client(sync_client=True) as client:
            return {
                run.id: (run.name, tuple(run.parameters["shards"]))
                for run in _children(client, [self._build])
                if run.deployment_id and run.state and not (run.state.is_final() or run.state.is_cancelling())
            }

    def submit(self, shards: Shards, attempt: int) -> tuple[UUID, str]:
        """Start a run, as `Runs.submit` describes.

        The idempotency key makes a request that is sent twice return the same run. A build that is retried or resumed
        starts new runs. (Prefect counts a resumed run as the same run, so the key has the state's id and no count.)
        """
        retries = part_of(self._retries, shards)
        batch = digest({"stages": self._stages, "shards": shards, "retries": retries})
        run = run_deployment(
            f"{FLOW}/{self._deployed.name}",
            parameters={
                "dataset_url": self._dataset_url,
                "shards": list(shards),
                "stages": self._stages,
                "retries": retries,
                "until": self._limits.until if self._limits else None,
            },
            scheduled_time=datetime.now(UTC) + HELD_BACK,
            timeout=0,
            idempotency_key=f"{self._build}/{self._begun}/{batch}/{attempt}",
            flow_run_name=run_name(self._dataset_url, shards, self._stages),
            tags=[f"dataset:{self._dataset_url.rpartition('/')[2]}"],
            work_queue_name=self._queue,
        )
        assert isinstance(run, FlowRun)  # flows are synchronous here
        if (
            run.state is not None and run.state.name == "Scheduled"
        ):  # not if the request found a run that was sent before
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run.id, Scheduled(name=WAITING, message="waits for a worker"), force=True)
        return run.id, run.name

    def limit(self) -> str:
        """Which limit of the build is reached, as `Runs.limit` describes."""
        return self._limits.reached() if self._limits else ""

    def address(self, run: UUID) -> str:
        """The address of a run's page."""
        return url_for("flow-run", obj_id=run) or str(run)

    def states(self, runs: Collection[UUID]) -> Mapping[UUID, State]:
        """The states of runs, as `Runs.states` describes. Takes one request per 200 runs, with the build's own run."""
        with get_client(sync_client=True) as client:
            found = {run.id: run for run in _read(client, [self._build, *runs])}
            if own := found.pop(self._build, None):
                self._obey(client, own)
        return {run.id: run.state for run in found.values() if run.state is not None}

    def _obey(self, client: SyncPrefectClient, own: FlowRun) -> None:
        """Raise what `Runs.states` says if the build's own run is not to go on in this process."""
        state = own.state
        if state is None:
            return
        if state.is_cancelling() or state.is_cancelled():
            raise Stopped
        if state.is_paused() and not state.state_details.pause_reschedule:
            # Prefect would resume it as Running and expect this process to have stayed, which its own tasks leave.
            state = Suspended(pause_expiration_time=state.state_details.pause_timeout, message=state.message)
            client.set_flow_run_state(self._build, state, force=True)
        elsewhere = state.is_scheduled() or state.is_pending() or (state.is_running() and state.id != self._begun)
        if state.is_paused() or elsewhere:
            raise Pause(state=state)

    def cancel(self, runs: Collection[UUID]) -> None:
        """Cancel those of the runs that have not ended."""
        with get_client(sync_client=True) as client:
            _cancel(client, _read(client, list(runs)))

    def give_up(self, run: UUID, reason: str) -> None:
        """Mark a run that no longer makes progress as crashed."""
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run, Crashed(message=reason), force=True)


def cancel_children(flow: object, flow_run: FlowRun, state: State) -> None:
    """Prefect's cancellation hook of a build: cancels the runs that the build started, and their children."""
    with get_client(sync_client=True) as client:
        parents = [flow_run.id]
        while parents:
            children = _children(client, parents)
            _cancel(client, children)
            parents = [run.id for run in children]


def other_build(config: DispatchConfig, dataset_url: str) -> str | None:
    """One line about the build or repair of the dataset that is at work already on the same server; None without one.

    Must be called inside a flow run. Of two runs that start at the same time, the one that started first finds none.
    A run that nothing was heard of for `SILENT_SECONDS` does not count, nor does a repair of chosen shards or stages.
    """
    if get_current_settings().api.url is None or not on_workers(config):
        return None
    own_id, since = UUID(own_run.id), datetime.now(UTC) - timedelta(seconds=SILENT_SECONDS)
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(BUILDS))),
            flow_run_filter=running,
            sort=FlowRunSort.START_TIME_DESC,
            limit=PAGE,
        )
        own_start = next((_start(run) for run in found if run.id == own_id), None)
        for run in found:
            earlier = own_start is not None and _start(run) < own_start
            if earlier and _dataset_of(run) == dataset_url and _heard(client, run, since):
                address = url_for("flow-run", obj_id=run.id) or run.id
                return (
                    f"{dataset_url}: the run {run.name} builds it already ({address}, since "
                    f"{_start(run)[0]:%Y-%m-%d %H:%M} UTC); wait for that run, or cancel it (if it was killed, it "
                    f"counts as ended {SILENT_SECONDS / 60:g} minutes after its last sign of life)"
                )
    return None


def _start(run: FlowRun) -> tuple[datetime, str]:
    """The order of runs that are at work: when they last began, then their ids."""
    assert run.state is not None  # only runs in a state are asked for
    return run.state.timestamp, str(run.id)


def _dataset_of(run: FlowRun) -> str | None:
    """The URL of the whole dataset that a build or repair processes, or None."""
    if url := run.labels.get(DATASET_LABEL):
        return str(url)
    parameters = run.parameters
    if parameters.get("shards") or parameters.get("stages"):
        return None
    try:
        if url := parameters.get("dataset_url"):
            return open_root(url).url
        config = parameters["config"]
        return dataset_url_of(config.get("root", DatasetConfig.model_fields["root"].default), config["name"])
    except (UserError, KeyError, AttributeError):  # started by hand with nonsense, or not labelled yet
        return None


def label_dataset(dataset_url: str) -> None:
    """Give the own flow run the name of the dataset that it builds, and a label with its URL, for other builds and for
    automations. Does nothing outside of a flow run."""
    if own_run.id is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run_labels(UUID(own_run.id), {DATASET_LABEL: dataset_url})
            try:
                client.update_flow_run(UUID(own_run.id), name=f"build {dataset_url.rpartition('/')[2]}")
            except Exception as error:  # it only helps people
                get_run_logger().warning("the run's name cannot be shown: %s: %s", type(error).__name__, error)


def dataset_url_of(root: str, name: str) -> str:
    """The URL of a dataset, as `Dataset.url` gives it."""
    return open_root(root).sub(name).url


def _heard(client: SyncPrefectClient, run: FlowRun, since: datetime) -> bool:
    """Whether the server has heard of a run since then."""
    wanted = EventFilter.model_validate(
        {"occurred": {"since": since}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
    )
    return _start(run)[0] > since or bool(client.read_events(wanted, limit=1).events)


def _children(client: SyncPrefectClient, parents: list[UUID]) -> list[FlowRun]:
    """The runs that the runs `parents` started."""
    children: list[FlowRun] = []
    below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents))
    while page := client.read_flow_runs(
        flow_run_filter=below, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(children)
    ):
        children += page
    return children


def _read(client: SyncPrefectClient, ids: Sequence[UUID]) -> list[FlowRun]:
    found: list[FlowRun] = []
    for start in range(0, len(ids), PAGE):
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))
        found += client.read_flow_runs(flow_run_filter=wanted, limit=PAGE)
    return found


def _cancel(client: SyncPrefectClient, runs: Iterable[FlowRun]) -> None:
    """Cancel runs in bulk, because Ctrl-C leaves only seconds.

    Waiting runs become Cancelled at once. Runs at work become Cancelling, and their worker ends them.
    """
    begun: list[FlowRun] = []
    waiting: list[FlowRun] = []
    for run in runs:
        if run.state is None or run.state.is_scheduled():
            waiting.append(run)
        elif not run.state.is_final() and not run.state.is_cancelling():
            begun.append(run)
    _set_states(client, begun, Cancelling(message="its build was cancelled"))
    _set_states(client, waiting, Cancelled(message="its build was cancelled, or needs it no more"))


def _set_states(client: SyncPrefectClient, runs: Sequence[FlowRun], state: State) -> None:
    values = state.model_dump(mode="json", include={"type", "name", "message"})
    for start in range(0, len(runs), BULK):
        ids = [str(run.id) for run in runs[start : start + BULK]]
        body = {"flow_runs": {"id": {"any_": ids}}, "state": values}
        answer = client.request("POST", "/flow_runs/bulk_set_state", json=body)  # type: ignore[arg-type]  # not in its list
        answer.raise_for_status()
