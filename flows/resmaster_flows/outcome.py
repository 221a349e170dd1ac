"""The final states of this project's own in which a flow run may end.

`Incomplete`: a failed state with the result, of a run that could not finish some shards. The name lets Prefect's UI and
the dispatcher distinguish a run that tried all its shards (it would fail the same way again) from a run that broke off.
`Skipped`: a cancelled state, of a build that gave way to another build of the same dataset.
`Limited`: a completed state with the result, of a run over shards that began no more of them because a limit of the
build was reached. The build itself ends as `Incomplete`, because something is missing.

This module also keeps Prefect's tracebacks out of the log of a run whose end is no surprise. The log shows the state's
message or the error's message instead.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import CancelledRun
from prefect.states import Cancelled, Completed, Failed

from resmaster_stages.errors import ResMasterError, UserError

INCOMPLETE = "Incomplete"
SKIPPED = "Skipped"
LIMITED = "Limited"


class Unfinished(Exception):
    """Carries the result of a run that ended `Incomplete`: Prefect raises what lies in a failed state."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message, result)
        self.result = result

    def __str__(self) -> str:
        return str(self.args[0])


def incomplete(message: str, result: Any) -> State[Any]:
    """The state that a flow returns instead of `result` when some shards are unfinished."""
    return Failed(name=INCOMPLETE, message=message, data=Unfinished(message, result))


def skipped(message: str) -> State[Any]:
    """The state that a flow returns when it gives way to another run, which `message` names."""
    return Cancelled(name=SKIPPED, message=message)


def limited(message: str, result: Any) -> State[Any]:
    """The state that a run over shards returns instead of `result` when a limit, which `message` names, ended it."""
    return Completed(name=LIMITED, message=message, data=result)


def outcome(state: State[Any]) -> Any:
    """The result of a flow that was called with `return_state=True`, complete or not.

    Re-raises the flow's error. Raises UserError if the flow gave way to another run, and ResMasterError if it was
    cancelled on the server.
    """
    if state.name == SKIPPED:
        raise UserError(str(state.message))
    if state.is_cancelled():
        raise ResMasterError(
            "cancelled on the Prefect server; what is done is kept: run the same command again to go on"
        )
    found = state.result(raise_on_failure=state.name != INCOMPLETE)
    return found.result if isinstance(found, Unfinished) else found


class Plain(logging.Filter):
    """Leaves the traceback out if the error is one of this project's own or of the store: its message says what to do.

    Drops the record if its message says nothing either: Prefect (3.8) logs "exited with unexpected exception" at the
    end of every run on a worker whose final state is not Completed, also if the flow returned that state.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, (ResMasterError, OSError, Unfinished, CancelledRun)):
            return True
        record.exc_info = None
        return "exited with unexpected exception" not in record.getMessage()


for _logger in ("prefect.engine", "prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(Plain())
