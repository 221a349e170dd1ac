"""The final states of this project's own in which a flow run may end.

`Incomplete`: a failed state with the result, of a run that could not finish some shards. The name lets Prefect's UI and
the dispatcher distinguish a run that tried all its shards (it would fail the same way again) from a run that broke off.
`Skipped`: a cancelled state, of a build that gave way to another build of the same dataset.
`Limited`: a completed state with the result, of a run over shards that began no more of them because a limit of the
build was reached. The build itself ends as `Incomplete`, because something is missing.

A run that ends by an error ends `Failed`, and the state's message is one sentence (`told`). Prefect's tracebacks stay
out of the log of a run whose end is no surprise. An error that nobody foresaw leaves one traceback there, without
Prefect's own frames.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import httpx
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, ParameterTypeError
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.redaction import one_line
from resmaster_stages.runner.shards import describe

INCOMPLETE = "Incomplete"
SKIPPED = "Skipped"
LIMITED = "Limited"

P = ParamSpec("P")
R = TypeVar("R")


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


FORESEEN = (ResMasterError, OSError, httpx.HTTPError, Unfinished, CancelledRun, ParameterTypeError)
"""Errors whose messages say what is wrong: this project's own, those of the store, the server and the form."""


def told(work: Callable[P, R]) -> Callable[P, R | State[Any]]:
    """Decorates the function of a flow: an error ends the run as `Failed`, with one sentence as the state's message.

    Without a flow run, and if the server is lost, the error is raised.
    """

    @wraps(work)
    def run(*args: P.args, **kwargs: P.kwargs) -> R | State[Any]:
        try:
            return work(*args, **kwargs)
        except httpx.HTTPError:
            raise  # nobody is there who could be told
        except Exception as error:
            if FlowRunContext.get() is None:
                raise
            if not isinstance(error, FORESEEN):
                get_run_logger().error("%s", describe(error), exc_info=error)  # `Plain` shortens it
            return Failed(message=sentence(error), data=error)

    run.__signature__ = inspect.signature(work, eval_str=True)  # type: ignore[attr-defined]  # Prefect reads types here
    return run


def sentence(error: Exception) -> str:
    """Why a run failed, in one line."""
    if isinstance(error, ResMasterError) or (isinstance(error, OSError) and str(error)):
        return one_line(error)
    return f"{describe(error)} (this was not foreseen; the log has its traceback)"


class Plain(logging.Filter):
    """Leaves out tracebacks of foreseen errors, whose messages say what to do, and all but the first of other errors.

    Drops the record if its message says nothing either: Prefect (3.8) logs "exited with unexpected exception" at the
    end of every run on a worker whose final state is not Completed, also if the flow returned that state.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        foreseen, shown = isinstance(error, FORESEEN), getattr(error, "_resmaster_shown", False)
        record.exc_info = None if foreseen or shown else (type(error), error, own_frames(error.__traceback__))
        error._resmaster_shown = True  # type: ignore[attr-defined]
        return not foreseen or "exited with unexpected exception" not in record.getMessage()


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of Prefect's own code."""
    kept: list[TracebackType] = []
    while trace is not None:
        if not trace.tb_frame.f_globals.get("__name__", "").startswith("prefect."):
            kept.append(trace)
        trace = trace.tb_next
    after: TracebackType | None = None
    for each in reversed(kept):
        after = TracebackType(after, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return after


for _logger in ("prefect.engine", "prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(Plain())
