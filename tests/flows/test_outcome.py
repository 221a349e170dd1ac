"""How a run ends, on a real server: the state, the result, and what the run's log says."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.flow_engine import run_flow
from prefect.logging.loggers import get_logger
from prefect.states import Cancelled

from resmaster_flows.outcome import Unfinished, incomplete, outcome, skipped, told
from resmaster_stages.errors import GpuLost, ResMasterError, ShardError, UserError

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


@flow
@told
def is_told(how: Callable[[], Exception]) -> None:
    """A flow as this project's are."""
    raise how()


def told_on_a_worker(how: Callable[[], Exception]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one is what the tests ask
        run_flow(is_told, parameters={"how": how}, error_logger=get_logger("flow_runs"))
    return caught.value


FORESEEN_ERRORS = [
    (UserError("prompts.txt: no such prompts file; check the path"),) * 2,
    (GpuLost("cuda:0 is gone; restart the worker"),) * 2,
    (ShardError("2 of 2 samples failed\nerror  samples"), "2 of 2 samples failed error  samples"),
    (ConnectionError("s3://bucket: cannot be reached; check the network"),) * 2,
]


@pytest.mark.parametrize(("error", "message"), FORESEEN_ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_ends_a_run_with_one_sentence(error: Exception, message: object, heard: list[str]) -> None:
    state = is_told(lambda: error, return_state=True)
    assert (state.type.value, state.name, state.message) == ("FAILED", "Failed", str(message))
    with pytest.raises(type(error)):
        outcome(state)
    heard.clear()
    assert told_on_a_worker(lambda: error) is error
    lines = "\n".join(heard).splitlines()
    assert [line for line in lines if str(message) in line] == [f"Finished in state Failed({str(message)!r})"]
    assert not any("Traceback" in line or "exception" in line for line in lines)


def test_an_error_that_nobody_foresaw_is_one_sentence_and_one_short_traceback(heard: list[str]) -> None:
    state = is_told(lambda: ZeroDivisionError("a bug"), return_state=True)
    assert state.message == "ZeroDivisionError: a bug (this was not foreseen; the log has its traceback)"
    heard.clear()
    told_on_a_worker(lambda: ZeroDivisionError("a bug"))
    text = "\n".join(heard)
    assert text.count("Traceback (most recent call last)") == 1
    assert text.count("\n  File ") == 2, "of the flow and of the decorator, and none of Prefect's"
    assert "/prefect/" not in text


def test_a_lost_server_and_a_call_without_a_run_are_raised() -> None:
    lost = httpx.ConnectError("refused")
    with pytest.raises(httpx.ConnectError):
        is_told(lambda: lost, return_state=True).result()
    with pytest.raises(UserError, match="no such file"):
        is_told.fn(lambda: UserError("no such file"))
