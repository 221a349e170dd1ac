"""The final state of a flow run that could not finish some shards: a failed state named `Incomplete` with the result.

The name lets Prefect's UI and the dispatcher distinguish a run that tried all its shards and could not finish some (it
would fail the same way again) from a run that broke off.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Failed

INCOMPLETE = "Incomplete"
"""The name of the state."""


def incomplete(message: str, result: Any) -> State[Any]:
    """The state that a flow returns instead of `result` when some shards are unfinished."""
    return Failed(name=INCOMPLETE, message=message, data=result)


def outcome(state: State[Any]) -> Any:
    """The result of a flow that was called with `return_state=True`, complete or not. Re-raises the flow's error."""
    return state.result(raise_on_failure=state.name != INCOMPLETE)
