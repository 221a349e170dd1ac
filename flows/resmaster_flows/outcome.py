"""What a flow run ended with when some shards were not finished: a failed state of its own name, with the result
inside.

The name tells a run that tried all its shards and could not finish some (the same would happen again) from one that
broke off, in Prefect's UI as to the dispatcher.
"""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Failed

INCOMPLETE = "Incomplete"
"""Name of the state."""


def incomplete(message: str, result: Any) -> State[Any]:
    """The state that a flow returns in place of `result` when shards are left over."""
    return Failed(name=INCOMPLETE, message=message, data=result)


def outcome(state: State[Any]) -> Any:
    """The result of a flow that was called with `return_state=True`, complete or not. What it raised is raised."""
    return state.result(raise_on_failure=state.name != INCOMPLETE)
