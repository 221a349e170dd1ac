"""Removes credentials and control characters from foreign text before it is shown, logged or stored.

This is the last line of defence: credentials belong in the environment, and a configuration that holds a credential is
refused earlier (`holds_credentials`).

Invariant: removing is idempotent, and a text without credentials and control characters does not change.
"""

from __future__ import annotations

import os
import re
import unicodedata
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


def printable(text: str) -> str:
    """`text` with control characters (which include terminal commands) and lone surrogates as visible escapes."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in text
    )


def one_line(error: object) -> str:
    """The message of an error (or any object) with its notes, as one line that may be shown and stored."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return printable(" ".join(redacted(f"{error}{notes}").split()))


def shortened(text: str, longest: int) -> str:
    """`text` without its middle if it is longer than about `longest` characters: of a message about a long value, the
    beginning says what is wrong, and the end what to do."""
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


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
