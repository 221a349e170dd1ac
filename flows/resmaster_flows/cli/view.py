"""`resmaster view`: shows a published dataset in the browser, to look through it and choose from it."""

from __future__ import annotations

import argparse
import getpass
import os
import signal
import sys
import threading
import webbrowser

from rich.console import Console

from resmaster_flows.cli.arguments import add_root
from resmaster_flows.cli.stop import KEPT, Terminated, exit_status, leave
from resmaster_stages.errors import UserError

DESCRIPTION = (
    "Show the published samples of a dataset in the browser: filter, sort, search and zoom, and keep, reject or rate "
    "samples. Choices are written to the dataset's folder curation/, and change nothing else. Only programs on this "
    "machine that know the printed address can reach the server. Runs until Ctrl-C. Needs no Prefect."
)
PORTS = range(1024, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add_root(parser)
    parser.add_argument("--port", type=int, default=0, metavar="N", help="listen on this port (default: a free one)")
    parser.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="open the address in a browser (default: if this machine has a display)",
    )
    parser.add_argument("--who", metavar="NAME", help="whose choices they are (default: this user's name)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Serve until a signal ends the command."""
    from resmaster_stages.dataset.dataset import open_dataset
    from resmaster_stages.gallery.serve import at_work, serving

    if args.port and args.port not in PORTS:
        raise UserError(f"--port {args.port}: give a number from {PORTS[0]} to {PORTS[-1]}, or leave it out")
    address = ""
    try:
        with serving(open_dataset(args.root), args.port, args.who or _user()) as address:
            print(f"view: {address}", flush=True)
            if _display() if args.open is None else args.open:
                webbrowser.open(address)
            threading.Event().wait()
    except (KeyboardInterrupt, Terminated) as stop:
        if at_work(address):
            leave(exit_status(signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT), f"{KEPT}\n")
        raise
    raise AssertionError("only a signal ends the wait")


def _user() -> str:
    """The name of this user; "" in a container whose user has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""


def _display() -> bool:
    """Whether a browser could open on this machine."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
