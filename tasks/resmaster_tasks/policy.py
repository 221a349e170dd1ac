"""The retry policy of all tasks: which failures are tried again, how often and after which delays.

Invariants:
- The user's mistakes, too many failed samples and a lost GPU are never retried, because the result would be the same.
- All other failures (object store hiccups, time-outs, full queues) are retried, with growing, jittered delays.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from resmaster_stages.errors import ResMasterError

RETRIES = 3
RETRY_DELAYS_SECONDS = exponential_backoff(2)
RETRY_JITTER = 0.5


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State) -> bool:
    """Prefect's retry condition: false for every error that this project raises on purpose."""
    try:
        state.result(raise_on_failure=True)
    except ResMasterError:
        return False
    except Exception:
        return True
    return False
