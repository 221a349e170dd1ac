"""The retry policy of all tasks, as Prefect reads it. `resmaster_stages.runner.retrying` holds it.

Invariant: the policy is the same with Prefect's engine and without it.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from resmaster_stages.runner import retrying
from resmaster_stages.runner.retrying import BACKOFF_SECONDS, RETRIES, RETRY_JITTER, may_pass

RETRY_DELAYS_SECONDS = exponential_backoff(BACKOFF_SECONDS)

__all__ = ["RETRIES", "RETRY_DELAYS_SECONDS", "RETRY_JITTER", "retried", "worth_retrying"]


def worth_retrying(task: Task[..., Any], task_run: TaskRun, state: State) -> bool:
    """Prefect's retry condition: false for every error that this project raises on purpose."""
    try:
        state.result(raise_on_failure=True)
    except Exception as error:
        return may_pass(error)
    return False


def retried(task: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a task's function without Prefect's engine, and again after errors that may pass, as the engine would."""
    return retrying.retried(lambda: task.fn(*args, **kwargs), task.name)
