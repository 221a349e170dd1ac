"""The project's error classes. A message names the cause and says what to do next.

| Error | What happens |
|---|---|
| `SampleError`, and errors that nobody foresaw | one row in the ledger; the shard goes on |
| `OutOfMemory` | half the batch, down to 1; then one row in the ledger |
| `ShardError` | nothing is committed; the other shards go on |
| `GpuLost` | the process ends: nothing computed after it can be trusted |
| `OSError` (store, network) | the shard's task is tried again, later and later |
| `ServerLost` | the command ends; what is committed stays |
| other `UserError` | the run ends; the CLI prints one line and exits with status 2, without a traceback |
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class ResMasterError(Exception):
    """Base of all errors that this project raises on purpose."""


class UserError(ResMasterError):
    """Bad input. The message is one line: what is wrong, and what to do about it."""


class ConfigError(UserError):
    """The configuration is wrong, or contradicts the existing dataset at the root. One line for each mistake."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class PlanError(UserError):
    """The dataset's plan or an upstream commit is missing or does not fit."""


class OutOfMemory(UserError):
    """A batch does not fit into the device's memory, or the computer's."""

    def __init__(self, message: str, batch: int | None = None) -> None:
        super().__init__(message)
        self.batch = batch
        """Size of the batch; None if unknown."""


class SampleError(ResMasterError):
    """One sample cannot be made (bad prompt, undecodable image, NaN latents). The shard goes on."""


class Quarantined(SampleError):
    """One sample killed the whole process several times, and is left out."""


class ShardError(ResMasterError):
    """A shard cannot be finished (too many samples failed, an object is damaged): nothing was committed."""


class GpuLost(ResMasterError):
    """The device is gone (illegal access, ECC, launch failure). Never retried in this process."""


class ServerLost(ConnectionError):
    """The Prefect server that is configured does not answer any more."""


def first_line(error: object) -> str:
    """The first line of an error's message, at most 160 characters; the name of its class if there is no message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:160]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, to be put after a `word` that is none of `known`; empty if none of these is close."""
    close = get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


EXTRAS = {
    "pipeline": ("prefect", "pyarrow", "duckdb", "scipy", "prometheus_client", "starlette", "uvicorn"),
    "s3": ("s3fs",),
}
"""Extra of pyproject.toml -> what is imported of the packages that it brings."""


def has_extra(extra: str) -> bool:
    """Whether all packages of `extra` are installed. Imports none of them."""
    return all(find_spec(module) for module in EXTRAS[extra])


def installation(extra: str) -> str:
    """The command that installs `extra`."""
    return f"pip install 'resmaster-pipeline[{extra}]'"


def require_extra(extra: str, what: str) -> None:
    """Raise UserError if a package of `extra` is not installed. what: that which needs it, for the message."""
    if not has_extra(extra):
        raise UserError(f"{what} needs the extra {extra}; install it with: {installation(extra)}")
