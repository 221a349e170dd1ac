"""The command `resmaster`: parses the arguments, calls the verb and reports errors.

A user's mistake is one line on stderr and exit status 2. Exit status: 0 done, 1 something is missing, failed or
damaged, 2 bad input, 3 stopped by a limit of money or hours, 130 interrupted (143 by SIGTERM).
Heavy imports (torch, Prefect) happen inside the commands that need them, so that `status` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console

import resmaster_stages
from resmaster_flows.cli import (
    compare,
    curate,
    doctor,
    explain,
    export,
    gc,
    init,
    plan,
    publish,
    repair,
    run,
    status,
    upscale,
    verify,
    view,
)
from resmaster_flows.cli.parser import Parser
from resmaster_flows.cli.stop import KEPT, NOTHING_WRITTEN, Terminated, exit_status, leave, stoppable
from resmaster_flows.plugins import load_plugins
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import ConfigError, ResMasterError, ServerLost, UserError
from resmaster_stages.redaction import one_line


class Verb(Protocol):
    """The interface of a module of this folder that is a verb. The verb's name is the module's name."""

    __name__: str
    HELP: str
    """A few words for the list of verbs."""
    DESCRIPTION: str
    """Some sentences for the verb's own help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    def run(self, args: argparse.Namespace, console: Console) -> int:
        """Do what the verb does, and return the exit status. `console` is standard error."""


VERBS: tuple[Verb, ...] = (
    init,
    run,
    plan,
    status,
    view,
    explain,
    repair,
    verify,
    publish,
    curate,
    export,
    gc,
    doctor,
    compare,
    upscale,
)
"""The verbs in the order of the help."""

KEEPING: tuple[Verb, ...] = (run, view, repair, publish, export, gc, compare)
"""The verbs that keep what they have done when they are interrupted. The others write at their end, or nothing."""

ENVIRONMENT = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the server counts a build as dead that is silent for long
    # How long a build waits for a lost server: about two minutes if connections are refused, else some more.
    "PREFECT_CLIENT_MAX_RETRIES": "4",
    "PREFECT_API_REQUEST_TIMEOUT": "20",
    # Errors are told by the command line itself; run logs still reach the Prefect UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""Environment variables of the command line, beside those of `resmaster_tasks`. Values that the user has set stay."""


def parser() -> Parser:
    """The parser of the command line."""
    top = Parser(
        prog="resmaster",
        description="High-resolution image datasets from prompts or from your own images: ResMaster and its peers, "
        "training-free, as durable stages on WebDataset shards.",
        epilog="Start here: resmaster init demo",
    )
    top.add_argument("-V", "--version", action="version", version=f"resmaster {resmaster_stages.__version__}")
    top.add_argument("--traceback", action="store_true", help="show Python tracebacks (for reporting a bug)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=verb.HELP, description=verb.DESCRIPTION)
        command.set_defaults(verb=verb)
        verb.add_arguments(command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `resmaster` command. Returns the exit status."""
    console = SafeConsole(stderr=True)
    for name, value in ENVIRONMENT.items():  # before a plugin imports a library that reads them
        os.environ.setdefault(name, value)
    try:
        load_plugins()  # before the parser is made, because its help lists what plugins register
    except UserError as error:
        say(console, f"resmaster: {one_line(error)}")
        return 2
    args = parser().parse_args(argv)
    interrupted = KEPT if args.verb in KEEPING else NOTHING_WRITTEN
    try:
        with stoppable(interrupted):
            done: int = args.verb.run(args, console)
            sys.stdout.flush()
            return done
    except (KeyboardInterrupt, Terminated) as stop:
        say(console, interrupted)
        return exit_status(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    except BrokenPipeError:  # the reader closed the pipe (`| head`); buffered output must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as Rich does for tables
    except (ResMasterError, OSError) as error:
        if args.traceback:
            raise
        for line in error.mistakes if isinstance(error, ConfigError) else (error,):
            say(console, f"resmaster: {one_line(line)}")
        if isinstance(error, ServerLost):
            leave(1)  # Prefect would try for minutes to send what it has not sent
        return 2 if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main())
