"""What may be shown, logged or stored of a text that came from elsewhere: no credential, no control character.

Knows nothing about who asks. The last line of defence: credentials belong in the environment, and a configuration that
holds one is refused (`holds_credentials`) before any of this is needed.

Invariant: cutting is idempotent, and a text without credentials and control characters stays what it is.
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
"""Shorter values of secret variables (`test`, `1`) are ordinary words too."""

_USER = re.compile(
    r"(?<=://)[^/\s]*@"  # user:password@host
    r"|(?<=s3://)[^/\s]+:\S*@"  # a secret key may hold slashes, and a bucket has no port
    r"|(?<=://)[^/\s:]+:(?!\d+(?:/|\s|$))\S*@"  # so may a password; host:8000/a@b is none
)
_SIGNATURE = re.compile(
    r"([?&](?:X-(?:Amz|Goog|Oss)-[\w-]+|AWSAccessKeyId|Signature|sig|se|sp|token|access_token|api[_-]?key|key|password|secret)"
    r"=)(?!\[hidden\])[^&#\s\"']+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|ACCESS_KEY|API_?KEY|AUTH_STRING|CREDENTIALS|(?:^|_)TOKEN(?:$|_)")


def without_credentials(text: str) -> str:
    """`text` with `user:password@`, signatures and tokens removed from the URLs in it."""
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _USER.sub("", text))


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a user, a password, a signature or a token."""
    return "://" in url and without_credentials(url) != url


def redacted(text: str) -> str:
    """`text` without credentials in URLs, and without the values of environment variables whose name says secret."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper())}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARACTERS:
            text = text.replace(secret, HIDDEN)
    return without_credentials(text)


def printable(text: str) -> str:
    """`text` with control characters (a terminal's commands too) and lone surrogates made visible as escapes."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in text
    )


def one_line(error: object) -> str:
    """An error's (or any) message, with its notes, as one line that may be shown and stored."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return printable(" ".join(redacted(f"{error}{notes}").split()))


@contextmanager
def no_secrets_in_errors() -> Iterator[None]:
    """An error whose message holds a credential leaves the block without it: of its class if it is ours, else
    RuntimeError."""
    try:
        yield
    except Exception as error:
        message = redacted(str(error))
        if message == str(error):
            raise
        ours = isinstance(error, ResMasterError)
        raise type(error)(message) if ours else RuntimeError(f"{type(error).__name__}: {message}") from None
