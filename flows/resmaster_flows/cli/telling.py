"""How much a verb tells, and where: `--verbose`, `--quiet` and `--log-file`, which every verb has.

The log file gets everything that is told on standard error, whatever the other two say, and what `--verbose` adds, with
times. Tracebacks are in it too. Credentials are taken out of every line (`resmaster_stages.redaction`).
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import resmaster_stages
from resmaster_flows.watch.terminal import SafeConsole, put
from resmaster_stages.errors import UserError
from resmaster_stages.progress import Event, Note, Step, listening
from resmaster_stages.redaction import one_line, printable_lines, redacted

OURS = ("resmaster", "resmaster_stages", "resmaster_tasks", "resmaster_flows")
"""The loggers of this project. The first one has what the command itself says."""

log = logging.getLogger(OURS[0])

_TIME, _LONGEST_TIME = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "), 32
"""How every log begins."""


def add_telling(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """Add the options. again: to a verb, after the command itself has them; a verb's win."""
    group = parser.add_argument_group("what is told")
    unset = argparse.SUPPRESS if again else None
    group.add_argument(
        *("-v", "--verbose"), action="store_true", default=unset, help="tell more: decisions, events, what is loaded"
    )
    group.add_argument(
        *("-q", "--quiet"), action="store_true", default=unset, help="tell nothing but results and what went wrong"
    )
    group.add_argument(
        "--log-file",
        metavar="FILE",
        default=unset,
        help="append all that is told, and what --verbose adds, to this file, with times",
    )
    group.add_argument(
        "--traceback", action="store_true", default=unset, help="show Python tracebacks (for reporting a bug)"
    )


@contextmanager
def telling(args: argparse.Namespace, words: Sequence[str], console: SafeConsole) -> Iterator[None]:
    """Within the block, `console` tells as much as the options say, and the log file is written.

    words: the command line. Raises UserError for options that contradict each other, and for a log file that cannot be
    written.
    """
    if args.verbose and args.quiet:
        raise UserError("--verbose and --quiet exclude each other: give one")
    file = None if args.log_file is None else _file(args.log_file)
    told = _Told(console, logging.DEBUG if args.verbose else logging.WARNING)
    # A logger with a handler is no longer shown by Python's last resort, which other libraries' warnings need.
    further = [file, *([] if logging.getLogger().handlers else [logging.lastResort])] if file else []
    begin = time.monotonic()
    with ExitStack() as afterwards:
        if file:
            afterwards.callback(file.close)
        afterwards.enter_context(_attached(OURS, [told, file] if file else [told] if args.verbose else []))
        afterwards.enter_context(_attached(("",), further))
        log.debug("resmaster %s: %s", resmaster_stages.__version__, shlex.join(words))
        console.hushed, console.heard = bool(args.quiet), log.info if file else None
        try:
            with listening(_hear):
                yield
        finally:
            console.hushed, console.heard = False, None
            log.debug("ended after %.1f s", time.monotonic() - begin)


@contextmanager
def _attached(names: Sequence[str], handlers: Sequence[logging.Handler | None]) -> Iterator[None]:
    """Within the block, the loggers have these handlers beside their own, and those of this project log everything.
    Without handlers, nothing changes."""
    loggers = [logging.getLogger(name) for name in names] if handlers else []
    before = [(each.level, each.propagate, each.handlers[:]) for each in loggers]
    for each in loggers:
        for handler in filter(None, handlers):
            each.addHandler(handler)
        if each.name in OURS:
            each.setLevel(logging.DEBUG)
            each.propagate = False  # what the loggers above would do with it, the handlers do
    try:
        yield
    finally:
        for each, (level, propagate, own) in zip(loggers, before):
            each.setLevel(level)
            each.propagate = propagate
            for handler in set(each.handlers) - set(own):
                each.removeHandler(handler)


def _hear(event: Event) -> None:
    """Log an event of the stages, but for those that a line tells already or that come by the dozen."""
    if not isinstance(event, Note | Step):
        log.debug("%s", event)


class _Redacting(logging.Formatter):
    """Takes credentials out of whole records, their tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(redacted(super().format(record)))


class _Told(logging.Handler):
    """Tells records of this project on the console, in one line each. What the console told itself is not repeated."""

    def __init__(self, console: SafeConsole, level: int) -> None:
        super().__init__(level)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not (record.name == log.name and record.levelno == logging.INFO):
            put(self._console, f"  {one_line(record.getMessage())}")


def _file(name: str) -> logging.Handler:
    """A handler that appends to a new file or an earlier log. Raises UserError."""
    try:
        if os.path.isfile(name):
            with open(name, "rb") as there:
                begin = there.read(_LONGEST_TIME)
            if begin and not _TIME.match(begin):
                raise UserError(f"--log-file {name}: is there already and is no log; give another file")
        handler = logging.FileHandler(name, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--log-file {name}: cannot be written ({reason}); give another file") from None
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    return handler
