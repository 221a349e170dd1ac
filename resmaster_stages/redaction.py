"""Removes credentials and noise from foreign text, and makes characters visible that act unseen, before it is shown or
logged.

This is the last line of defence: credentials belong in the environment, and a configuration that holds a credential is
refused earlier (`holds_credentials`).

Invariant: removing is idempotent, and a short text without credentials and unseen characters does not change.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from resmaster_stages.errors import ResMasterError

HIDDEN = "[hidden]"
MIN_SECRET_CHARACTERS = 8
"""Shorter values of secret variables (`test`, `1`) are not hidden, because they are also ordinary words."""

_USER = re.compile(
    r"(?<=://)[^/\s]*@"  # user:password@host
    r"|(?<=s3://)[^/\s]+:\S*@"  # a secret key may hold slashes, and a bucket has no port
    r"|(?<=://)[^/\s:]+:(?!\d+(?:/|\s|$))\S*@"  # a password may hold slashes too; host:8000/a@b is no password
)
_SIGNATURE = re.compile(
    r"([?&](?:X-(?:Amz|Goog|Oss)-[\w-]+|AWSAccessKeyId|Signature|sig|se|sp|token|access_token|api[_-]?key|key|password|secret)"
    r"=)(?!\[hidden\])[^&#\s\"']+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_?KEY|AUTH_STRING|CREDENTIALS|(?:^|_)TOKEN(?:$|_)")
_NO_SECRET = re.compile(r"_(?:ID|FILE|PATH|DIR)$|^GOOGLE_APPLICATION_CREDENTIALS$")
"""Variables with the name of an account or the place of a file: messages are unreadable without their values."""
_OWN_NAME = "resmaster"
"""This project's name is no secret, whatever variable holds it, because most messages hold the name."""

_JOINED = r"\u0590-\u1fff\u2190-\u2bff\u2e80-\ud7ff\uf900-\ufefc\U00010000-\U000dffff"
"""Characters between which a joiner does its work: emoji, and letters of scripts beyond Latin, Greek and Cyrillic."""
_UNSEEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff"  # control characters, which include terminal commands; lone surrogates
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # they turn the direction of text
    r"\xad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u2060-\u2065\u3164\ufeff\uffa0\ufff0-\ufffb"  # no ink
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    rf"|(?<![{_JOINED}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}])"
)
"""Characters that act without being seen: they command terminals, turn the direction of text, or hide in it."""


def without_credentials(text: str) -> str:
    """`text` with `user:password@`, signatures and tokens removed from the URLs in it."""
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _USER.sub("", text))


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a user, a password, a signature or a token."""
    return "://" in url and without_credentials(url) != url


def redacted(text: str) -> str:
    """`text` without credentials in URLs, and without the values of environment variables with a secret's name."""
    names = [name for name in os.environ if _SECRET_NAME.search(name.upper()) and not _NO_SECRET.search(name.upper())]
    secrets = {os.environ[name] for name in names} - {_OWN_NAME}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARACTERS:
            text = text.replace(secret, HIDDEN)
    return without_credentials(text)


LINE_CHARACTERS = 2000
"""Longest line that is shown of an error."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")
"""Where an object lies in memory. It differs from run to run."""


def printable(text: str) -> str:
    """`text` in one line, with characters that act without being seen as visible escapes."""
    if text.isascii() and text.isprintable():  # ten times as fast for what is long: the images of a report
        return text
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """`printable` for each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    """JSON with characters that act without being seen as JSON's own escapes. Its value stays the same."""
    lines = (_UNSEEN.sub(lambda found: _json_escape(found[0]), line) for line in text.split("\n"))
    return "\n".join(lines)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex("_", 2).split("_")
    return "".join(f"\\u{unit}" for unit in units)


def one_line(error: object) -> str:
    """The message of an error (or any object) with its notes, as one line that may be shown and stored. Spaces within a
    line stay, because names may hold them."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    lines = (line.strip() for line in _ADDRESS.sub("", redacted(f"{error}{notes}")).splitlines())
    return shortened(printable(" ".join(filter(None, lines))), LINE_CHARACTERS)


def quoted(word: object) -> str:
    """`word` as one word of a command that is shown to be copied into a shell, without credentials."""
    return shlex.quote(without_credentials(str(word)))


def shortened(text: str, longest: int) -> str:
    """`text` without its middle if it has more than `longest` characters: of a message about a long value, the
    beginning says what is wrong, and the end what to do."""
    gap = " ... "
    end = (longest - len(gap)) // 2
    return text if len(text) <= longest else f"{text[: longest - len(gap) - end]}{gap}{text[-end:]}"


@contextmanager
def no_secrets_in_errors() -> Iterator[None]:
    """Replace an error whose message holds a credential by one without it: of the same class if it is a
    ResMasterError, else a RuntimeError."""
    try:
        yield
    except Exception as error:
        message = redacted(str(error))
        if message == str(error):
            raise
        ours = isinstance(error, ResMasterError)
        raise type(error)(message) if ours else RuntimeError(f"{type(error).__name__}: {message}") from None
