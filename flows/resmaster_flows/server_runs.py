"""Submits, watches and cancels flow runs of the deployment `process-shards` on a Prefect server.

This module does not track which shards are finished: `resmaster_flows.dispatch` does.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.results import get_default_result_storage
from prefect.runtime import deployment as own_deployment
from prefect.runtime import flow_run as own_run
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings, load_profiles
from prefect.states import Cancelled, Cancelling, Crashed

from resmaster_flows.dispatch import Shards, Stopped
from resmaster_flows.process import run_name
from resmaster_stages.config.dataset import DispatchConfig
from resmaster_stages.dataset.retry import Retries, part_of
from resmaster_stages.errors import UserError
from resmaster_stages.keys import digest
from resmaster_stages.redaction import one_line

FLOW = "process-shards"
REPAIR_QUEUE = "gpu-repair"
"""Work queue of repairs. Workers take runs from this queue before runs from the queue of builds."""

TEMPORARY_SERVER_STARTS = 3

PAGE = 200
"""Runs per request to the server."""
BULK = 50
"""Runs whose state one request sets at most."""


def on_workers(config: DispatchConfig) -> bool:
    """Whether workers do the work: if the configuration says so, or with `auto` if a server is configured."""
    return config.where == "workers" or (config.where == "auto" and get_current_settings().api.url is not None)


def start_temporary_server() -> None:
    """Start the temporary server that Prefect would start at the first flow run, but try several times.

    Prefect (3.8) gives up if the first answer takes 5 s, which happens on a busy machine. The second server starts
    faster, because the first has created the database. Raises ConnectionError if no server answers, and UserError if
    Prefect's settings allow no temporary server, or if its folder cannot be written.
    """
    require_home()
    if not get_current_settings().server.ephemeral.enabled:
        raise UserError(
            "no Prefect server is configured, and Prefect's settings allow no temporary one: set PREFECT_API_URL "
            "(make up starts a server), or PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=true"
        )
    for _ in range(TEMPORARY_SERVER_STARTS):
        server = SubprocessASGIServer()
        try:
            server.start()
        except httpx.TimeoutException:
            server.stop()
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            server.stop()
            raise ConnectionError(
                f"the temporary Prefect server did not start ({one_line(error)}); check PREFECT_HOME and the free "
                "ports, or start a server that stays: make up"
            ) from error
        else:
            return
    raise ConnectionError(
        f"a temporary Prefect server did not answer, {TEMPORARY_SERVER_STARTS} times; try again when this machine is "
        "less busy, or start one that stays: make up"
    )


def require_answer() -> None:
    """Raise UserError if a server is configured but is none that can be used, or if none is configured and a temporary
    one would have no folder to write to, or for an unknown profile of Prefect's settings."""
    profile, known = os.environ.get("PREFECT_PROFILE"), load_profiles().names
    if profile and profile not in known:
        raise UserError(f"PREFECT_PROFILE: Prefect has no profile {profile!r}; known: {', '.join(sorted(known))}")
    api = get_current_settings().api.url
    if api is None:
        require_home()
        return
    if not api.startswith(("http://", "https://")):
        raise UserError(f"PREFECT_API_URL: {api} has no http:// or https://")
    client = get_client(sync_client=True)
    if (error := client.api_healthcheck()) is not None:
        raise UserError(f"{api}: no answer ({error}); start the server, or unset PREFECT_API_URL to do without one")
    try:
        client.raise_for_api_version_mismatch()
    except (RuntimeError, httpx.HTTPError) as unfit:
        reason = one_line(unfit.__cause__ or unfit)
        raise UserError(
            f"{api}: no Prefect server that can be used ({reason}); check PREFECT_API_URL, which ends in /api, "
            "PREFECT_API_KEY and PREFECT_API_AUTH_STRING"
        ) from unfit


def require_home() -> None:
    """Raise UserError if the folder of a temporary server's database cannot be written."""
    home = get_current_settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise UserError(f"PREFECT_HOME {home} cannot be written ({error.strerror}); set PREFECT_HOME") from error


def require_result_storage() -> None:
    """Raise UserError if Prefect's setting for the storage of results names a block that cannot be used. Starts the
    temporary server, which has the blocks, if no server is configured."""
    block = get_current_settings().results.default_storage_block
    if block is None:
        return
    if get_current_settings().api.url is None:
        start_temporary_server()
    try:
        get_default_result_storage()
    except Exception as error:  # whatever the block's own code raises
        raise UserError(
            f"PREFECT_DEFAULT_RESULT_STORAGE_BLOCK {block} cannot be used ({one_line(error)}); unset it, because this "
            "project needs no such storage"
        ) from error


@contextmanager
def server_within_reach() -> Iterator[None]:
    """Provide a server within the block: the configured server, or else a temporary one.

    Raises ConnectionError if the configured server is lost within the block.
    """
    api = get_current_settings().api.url
    if api is None:
        start_temporary_server()
        yield
        return
    try:
        yield
    except httpx.HTTPError as error:
        raise ConnectionError(
            f"{api}: lost ({error or type(error).__name__}); what is committed is kept: run the same command again"
        ) from error


class ServerRuns:
    """The runs of one build. Implements `dispatch.Runs`; must be created inside the build's flow run."""

    def __init__(
        self,
        config: DispatchConfig,
        dataset_url: str,
        stages: list[str] | None = None,
        retries: Retries | None = None,
        queue: str | None = None,
    ) -> None:
        """queue: work queue; default: the deployment's. Raises UserError if server or deployment does not exist."""
        api = get_current_settings().api.url
        if api is None:
            raise UserError("dispatch.where is workers, but no server is configured: set PREFECT_API_URL (make up)")
        self.deployment = f"{FLOW}/{config.deployment or own_deployment.name or 'process'}"
        with get_client(sync_client=True) as client:
            try:
                client.read_deployment_by_name(self.deployment)
            except ObjectNotFound:
                raise UserError(
                    f"{api}: has no deployment {self.deployment}; make it with: make deploy (or unset PREFECT_API_URL "
                    "to do the work in this process)"
                ) from None
        self._dataset_url = dataset_url
        self._stages = stages
        self._retries = retries
        self._queue = queue
        self._build = UUID(own_run.id)
        self._build_count: int = own_run.run_count

    def submit(self, shards: Shards, attempt: int) -> tuple[UUID, str]:
        """Start a run, as `Runs.submit` describes.

        The idempotency key makes a request that is sent twice return the same run. A retried build starts new runs.
        """
        retries = part_of(self._retries, shards)
        batch = digest({"stages": self._stages, "shards": shards, "retries": retries})
        run = run_deployment(
            self.deployment,
            parameters={
                "dataset_url": self._dataset_url,
                "shards": list(shards),
                "stages": self._stages,
                "retries": retries,
            },
            timeout=0,
            idempotency_key=f"{self._build}/{self._build_count}/{batch}/{attempt}",
            flow_run_name=run_name(self._dataset_url, shards, self._stages),
            tags=[f"dataset:{self._dataset_url.rpartition('/')[2]}"],
            work_queue_name=self._queue,
        )
        assert isinstance(run, FlowRun)  # flows are synchronous here
        return run.id, run.name

    def states(self, runs: Collection[UUID]) -> Mapping[UUID, State]:
        """The states of runs, as `Runs.states` describes. Takes one request per 200 runs, with the build's own run."""
        with get_client(sync_client=True) as client:
            found = {run.id: run.state for run in _read(client, [self._build, *runs]) if run.state is not None}
        own = found.pop(self._build, None)
        if own is not None and (own.is_cancelling() or own.is_cancelled()):
            raise Stopped
        return found

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
            children: list[FlowRun] = []
            below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents))
            while page := client.read_flow_runs(
                flow_run_filter=below, sort=FlowRunSort.ID_DESC, limit=PAGE, offset=len(children)
            ):
                children += page
            _cancel(client, children)
            parents = [run.id for run in children]


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
