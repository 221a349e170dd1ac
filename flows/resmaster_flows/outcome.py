"""The final states of this project's own in which a flow run may end.

`Incomplete`: a failed state with the result, of a run that could not finish some shards. The name lets Prefect's UI and
the dispatcher distinguish a run that tried all its shards (it would fail the same way again) from a run that broke off.
`Skipped`: a cancelled state, of a build that gave way to another build of the same dataset.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Failed

from resmaster_stages.errors import UserError

INCOMPLETE = "Incomplete"
SKIPPED = "Skipped"


def incomplete(message: str, result: Any) -> State[Any]:
    """The state that a flow returns instead of `result` when some shards are unfinished."""
    return Failed(name=INCOMPLETE, message=message, data=result)


def skipped(message: str) -> State[Any]:
    """The state that a flow returns when it gives way to another run, which `message` names."""
    return Cancelled(name=SKIPPED, message=message)


def outcome(state: State[Any]) -> Any:
    """The result of a flow that was called with `return_state=True`, complete or not.

    Re-raises the flow's error. Raises UserError if the flow gave way to another run.
    """
    if state.name == SKIPPED:
        raise UserError(str(state.message))
    return state.result(raise_on_failure=state.name != INCOMPLETE)
