"""The retry policy of all tasks: which failures are tried again, how often and after which delays.

Invariants:
- The user's mistakes, too many failed samples and a lost GPU are never retried, because the result would be the same.
- All other failures (object store hiccups, time-outs, full queues) are retried, with growing, jittered delays.
- The policy is the same with Prefect's engine and without it.
"""

from __future__ import annotations

import random
import time
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from resmaster_stages.errors import ResMasterError
from resmaster_stages.progress import Note, emit
from resmaster_stages.redaction import one_line

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


def retried(task: Task[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a task's function without Prefect's engine, and again after errors that may pass, as the engine would."""
    for seconds in RETRY_DELAYS_SECONDS(task.retries):
        try:
            return task.fn(*args, **kwargs)
        except ResMasterError:
            raise
        except Exception as error:
            delay = seconds * random.uniform(1, 1 + RETRY_JITTER)
            emit(Note(f"{task.name}: {type(error).__name__}: {one_line(error)}; trying again in {delay:.0f} s"))
        time.sleep(delay)
    return task.fn(*args, **kwargs)
