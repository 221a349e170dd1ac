"""Calls flows and tasks: through Prefect's engine if there is a server, and as plain functions if there is none.

Invariant: a build without a configured server needs no server. It starts none, and it writes nothing to PREFECT_HOME.
"""

from __future__ import annotations

from typing import Any

import httpx
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.flows import Flow
from prefect.settings import get_current_settings
from prefect.tasks import Task

from resmaster_flows.outcome import outcome
from resmaster_tasks.policy import retried


def call(work: Flow[..., Any] | Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a flow or a task, and return its result, complete or not. Raises what `outcome` raises.

    Prefect records the call if a server is configured, or if the caller is a flow run already. If not, the function
    itself is called, and the errors of a task are retried by the same policy.
    """
    settings = get_current_settings()
    if FlowRunContext.get() is not None or settings.api.url is not None:
        try:
            state: Any = work(*args, return_state=True, **kwargs)
            return outcome(state)
        except httpx.HTTPError:
            if isinstance(work, Flow):  # the server is lost: do not wait as long for each flow run above this one
                settings.client.max_retries = 0
            raise
    found = retried(work, *args, **kwargs) if isinstance(work, Task) else work.fn(*args, **kwargs)
    return outcome(found) if isinstance(found, State) else found
