"""Says in one line what went wrong at the Hugging Face hub, and what to do.

Invariants:
- A mistake that no retry can mend is a UserError, and an outage is a ConnectionError. Bugs pass unchanged.
- No message holds a URL of a request: such URLs hold signatures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.progress import Note, emit
from resmaster_stages.redaction import one_line, shortened

TRIES = 6
"""How often a request is sent that the client's library sends once."""
LONGEST_WAIT_SECONDS = 8.0
LONGEST_ASKED_SECONDS = 3600.0
"""A hub counts commits by the hour. If it asks to wait for longer, the push ends."""
SHOWN_CHARACTERS = 300

_AGAIN = "run the same command again; what is sent is kept"
_LOG_IN = "log in with: hf auth login, or set HF_TOKEN"
NO_TOKEN = f"nobody is logged in to the hub here; {_LOG_IN} (a token that may write)"
_NO_RIGHT = (
    "the token may not do this there; use one with the right to write (https://huggingface.co/settings/tokens), of a "
    "user who may write to this namespace, and look at the account's storage if the hub's answer speaks of that"
)
_MEANINGS = {
    401: f"the hub does not accept the token; {_LOG_IN}",
    402: "the hub asks for a paid plan; look at the account's storage and billing",
    403: _NO_RIGHT,
    404: "the hub has no such dataset, branch or file, or does not show it to this token; check the name and the token",
    413: "the hub refuses this amount; look at the account's storage",
    507: "the storage there is used up; free some, or get more",
}
"""Status of an answer -> what it means and what to do. No retry mends these."""
_PASSING = (408, 409, 412, 425, 429)

Answer = TypeVar("Answer")


@contextmanager
def told(place: str) -> Iterator[None]:
    """Turn errors of the hub, of its client and of the network into one line about `place`."""
    try:
        yield
    except ResMasterError:
        raise
    except Exception as error:
        found = _told(place, error)
        if found is None:
            raise
        raise found from error


def again(call: Callable[[], Answer]) -> Answer:
    """The result of `call`, which is tried again after a failure that may pass. Waits as long as the hub asks to."""
    for number in range(TRIES - 1):
        try:
            return call()
        except Exception as error:
            seconds = _seconds_to_wait(error, number)
            if seconds is None:
                raise
            if seconds > LONGEST_WAIT_SECONDS:
                emit(Note(f"the hub asks to wait for {seconds:.0f} s"))
            time.sleep(seconds)
    return call()


def _seconds_to_wait(error: Exception, number: int) -> float | None:
    """How long to wait after the try `number` (from 0). None: another try would fail too, or comes too late."""
    answer = _answer(error)
    if answer is None:
        passing = _of_network(error) is not None or _of_kind(error, json.JSONDecodeError) is not None
        return min(LONGEST_WAIT_SECONDS, 2.0**number) if passing else None
    if answer.status_code not in _PASSING and answer.status_code < 500:
        return None
    asked = _asked_seconds(answer)
    if asked is None:
        return min(LONGEST_WAIT_SECONDS, 2.0**number)
    return asked if asked <= LONGEST_ASKED_SECONDS else None


def _asked_seconds(answer: Any) -> float | None:
    """How long the hub asks to wait; None if it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(answer.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    after = answer.headers.get("Retry-After", "")
    return float(after) if after.isdecimal() else None


def _told(place: str, error: Exception) -> Exception | None:
    """The error that says in one line what went wrong; None if `error` is to pass unchanged."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    if _of_kind(error, OfflineModeIsEnabled):
        return UserError(f"{place}: HF_HUB_OFFLINE is set, so nothing is sent or looked at there; unset it")
    if revision := _of_kind(error, RevisionNotFoundError):
        return UserError(
            f"{place}: there is no such branch ({_said(revision)}); make it with: hf repos branch create, or leave "
            "@BRANCH out"
        )
    if (answer := _answer(error)) is not None:
        return _of_answer(place, answer.status_code, error)
    if (network := _of_network(error)) is not None:
        reason = shortened(one_line(network) or type(network).__name__, SHOWN_CHARACTERS)
        return ConnectionError(
            f"{place}: the hub cannot be reached ({reason}); check the network and HF_ENDPOINT, then {_AGAIN}"
        )
    if isinstance(error, HFValidationError):
        return UserError(f"{place}: {one_line(error)}")
    if isinstance(error, json.JSONDecodeError):
        return ConnectionError(f"{place}: the answer is not that of a hub; check HF_ENDPOINT, then {_AGAIN}")
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        return UserError(f"{place}: the hub does not take the header of the card: {_said(error)}; correct it there")
    if isinstance(error, (RuntimeError, ValueError)) and _from_client(error):
        return ConnectionError(f"{place}: the upload failed ({_said(error)}); {_AGAIN}")
    return None


def _of_answer(place: str, status: int, error: Exception) -> Exception:
    if status in _MEANINGS:
        return UserError(f"{place}: {_MEANINGS[status]} (the hub says: {_said(error)})")
    if status == 429:
        return ConnectionError(f"{place}: too many requests at the hub ({_said(error)}); wait, then {_AGAIN}")
    if 400 <= status < 500 and status not in _PASSING:
        return UserError(f"{place}: the hub refuses this ({status}: {_said(error)})")
    return ConnectionError(f"{place}: the hub answered {status} ({_said(error)}); {_AGAIN}")


def _said(error: Exception) -> str:
    """What the hub itself said, without the addresses that its client adds."""
    from huggingface_hub.errors import HfHubHTTPError

    of_hub = _of_kind(error, HfHubHTTPError)
    text = (of_hub.server_message or f"status {of_hub.response.status_code}") if of_hub else str(error)
    return shortened(one_line(text), SHOWN_CHARACTERS)


def _answer(error: Exception) -> Any:
    """The answer of the hub behind an error, or None."""
    from huggingface_hub.errors import HfHubHTTPError

    found = _of_kind(error, HfHubHTTPError)
    return None if found is None else found.response


def _of_network(error: Exception) -> Any:
    """The error of the network behind an error, or None."""
    import httpx2

    return _of_kind(error, httpx2.TransportError)


def _of_kind(error: BaseException | None, kind: type) -> Any:
    """The first of an error and those that it was raised from that is of a kind, or None."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None


def _from_client(error: Exception) -> bool:
    """Whether an error was raised inside the client's library, and not by a mistake here."""
    trace, last = error.__traceback__, ""
    while trace is not None:
        last = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return last.partition(".")[0] in ("huggingface_hub", "hf_xet")
