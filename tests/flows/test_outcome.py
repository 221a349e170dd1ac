"""How a run ends, on a real server: the state, the result, and what the run's log says."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.flow_engine import run_flow
from prefect.logging.loggers import get_logger
from prefect.states import Cancelled

from resmaster_flows.outcome import Unfinished, incomplete, outcome, skipped
from resmaster_stages.errors import ResMasterError, UserError

End = Callable[[], State[Any] | Exception]

pytestmark = pytest.mark.usefixtures("server")


class Heard(logging.Handler):
    """Keeps what is logged, as a page would show it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def heard() -> Iterator[list[str]]:
    handler = Heard()
    loggers = [logging.getLogger(f"prefect.{name}") for name in ("flow_runs", "task_runs")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.lines
    for logger in loggers:
        logger.removeHandler(handler)


def unfinished() -> State[Any]:
    return incomplete("shards 1 not finished", {"1": "no"})


def gave_way() -> State[Any]:
    return skipped("another run builds it")


def stopped() -> State[Any]:
    return Cancelled(message="its runs were cancelled")


@task
def fail(error: Exception) -> None:
    raise error


@flow
def ends(how: End) -> State[Any]:
    """Returns a state, or lets a task raise an error."""
    end = how()
    if isinstance(end, Exception):
        fail(end)
    return end


def on_a_worker(how: End) -> Exception:
    """Run the flow as the process that a worker starts, and return the error that reaches the end of that process."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is what the tests ask
        run_flow(ends, parameters={"how": how}, error_logger=get_logger("flow_runs"))
    return caught.value


@pytest.mark.parametrize("how", [unfinished, gave_way, stopped])
def test_a_state_of_this_project_ends_a_run_without_a_traceback(how: End, heard: list[str]) -> None:
    message = str(on_a_worker(how))
    assert isinstance(end := how(), State)
    assert message == end.message
    text = "\n".join(heard)
    assert message in text
    assert "Traceback" not in text
    assert "unexpected exception" not in text


def test_a_users_mistake_is_told_by_its_message_alone(heard: list[str]) -> None:
    on_a_worker(lambda: UserError("prompts.txt: no such prompts file; check the path"))
    text = "\n".join(heard)
    assert "no such prompts file" in text
    assert "Traceback" not in text
    assert "unexpected exception" not in text


def test_an_error_of_the_store_is_told_by_its_message_alone(heard: list[str]) -> None:
    on_a_worker(lambda: ConnectionError("s3://bucket: cannot be reached (Connection refused); check the network"))
    text = "\n".join(heard)
    assert "s3://bucket: cannot be reached" in text
    assert "Traceback" not in text
    assert "unexpected exception" not in text


def test_any_other_error_has_its_traceback(heard: list[str]) -> None:
    on_a_worker(lambda: ZeroDivisionError("a bug"))
    text = "\n".join(heard)
    assert "Traceback" in text
    assert "unexpected exception" in text


def test_an_unfinished_run_gives_its_result() -> None:
    assert outcome(ends(unfinished, return_state=True)) == {"1": "no"}
    kept = pickle.loads(pickle.dumps(Unfinished("shards 1 not finished", {"1": "no"})))  # Prefect may keep results
    assert (str(kept), kept.result) == ("shards 1 not finished", {"1": "no"})


def test_a_cancelled_run_is_told_in_a_line() -> None:
    with pytest.raises(ResMasterError, match="cancelled on the Prefect server; what is done is kept"):
        outcome(ends(stopped, return_state=True))
