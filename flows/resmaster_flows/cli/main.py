"""The command `resmaster`: parses the arguments, calls the verb and reports errors.

A user's mistake is one line on stderr and exit status 2. Exit status: 0 done, 1 something is missing, failed or
damaged, 2 bad input, 130 interrupted (143 by SIGTERM).
The module of a verb is imported when the verb is used, so that a verb needs only its own packages. Its heavy imports
(torch, Prefect) happen inside its `run`, so that `status` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from rich.console import Console

import resmaster_stages
from resmaster_flows.cli.parser import Parser
from resmaster_flows.cli.stop import KEPT, NOTHING_WRITTEN, Terminated, exit_status, leave, stoppable
from resmaster_flows.plugins import load_plugins
from resmaster_flows.watch.terminal import SafeConsole, say
from resmaster_stages.errors import ConfigError, ResMasterError, ServerLost, UserError, require_extra
from resmaster_stages.redaction import one_line


class VerbModule(Protocol):
    """The interface of a module of this folder that is a verb. The verb's name is the module's name."""

    DESCRIPTION: str
    """Some sentences for the verb's own help."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    def run(self, args: argparse.Namespace, console: Console) -> int:
        """Do what the verb does, and return the exit status. `console` is standard error."""


@dataclass(frozen=True)
class Verb:
    """What is known of a verb before its module is imported."""

    name: str
    help: str
    """A few words for the list of verbs."""
    keeps: bool = False
    """Whether what it has done is kept when it is interrupted. Other verbs write at their end, or nothing."""
    extra: str | None = "pipeline"
    """The extra whose packages its `run` needs; None if the base install is enough."""

    def module(self) -> VerbModule:
        """Import the verb's module, for which the base install is enough."""
        return cast(VerbModule, import_module(f"resmaster_flows.cli.{self.name}"))

    def fill(self, parser: argparse.ArgumentParser) -> None:
        """Give the verb's parser its description and arguments."""
        module = self.module()
        parser.description = module.DESCRIPTION
        module.add_arguments(parser)

    def run(self, args: argparse.Namespace, console: Console) -> int:
        """Do what the verb does. Raises UserError if its packages are not installed."""
        if self.extra:
            require_extra(self.extra, self.name)
        return self.module().run(args, console)


VERBS: tuple[Verb, ...] = (
    Verb("init", "write configurations and prompts to start from", extra=None),
    Verb("run", "build a dataset, or go on with it", keeps=True),
    Verb("plan", "say what `run` would do; change nothing"),
    Verb("status", "what is committed, pending, failed"),
    Verb("view", "look through a dataset in the browser, and choose from it", keeps=True),
    Verb("explain", "all that is known of one sample or shard"),
    Verb("repair", "do only what is missing, failed or damaged", keeps=True),
    Verb("verify", "read everything back, and say what is damaged"),
    Verb("publish", "write manifest, index, card and report again, and push to a hub", keeps=True),
    Verb("curate", "keep or reject samples; import and export choices"),
    Verb("export", "write chosen samples in the formats of other tools", keeps=True),
    Verb("gc", "remove what no commit names", keeps=True),
    Verb("doctor", "say whether a store is fit for builds"),
    Verb("compare", "build the same samples by several methods, and measure them", keeps=True),
    Verb("upscale", "upscale one image of your own", extra=None),
)
"""The verbs in the order of the help."""

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
    """The parser of the command line. The parsers of verbs are empty until they are used or `Parser.fill` is called."""
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
        command = commands.add_parser(verb.name, help=verb.help, fill=verb.fill)
        command.set_defaults(verb=verb)
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
    interrupted = KEPT if args.verb.keeps else NOTHING_WRITTEN
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
