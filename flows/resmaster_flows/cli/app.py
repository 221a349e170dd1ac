"""`resmaster app`: a page in the browser that upscales one image by every method."""

from __future__ import annotations

import argparse
import os
import threading
import webbrowser

from rich.console import Console

from resmaster_flows.cli.view import PORTS, display
from resmaster_stages.errors import UserError

DESCRIPTION = (
    "Show a page in the browser that upscales one image at a time by any method, and compares the result with the "
    "image. Only programs on this machine that know the printed address can reach it. Runs until Ctrl-C. Needs the "
    "extra `app`, and no Prefect."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--model",
        default="picturebook",
        metavar="ID",
        help="the model that is chosen first: picturebook, a hub id, or a folder (default: picturebook)",
    )
    parser.add_argument("--port", type=int, default=0, metavar="N", help="listen on this port (default: a free one)")
    parser.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="open the address in a browser (default: if this machine has a display)",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    """Serve until a signal ends the command."""
    if args.port and args.port not in PORTS:
        raise UserError(f"--port {args.port}: give a number from {PORTS[0]} to {PORTS[-1]}, or leave it out")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    from resmaster_flows.app.serve import serving

    with serving(args.port, args.model) as address:
        print(f"app: {address}", flush=True)
        if display() if args.open is None else args.open:
            webbrowser.open(address)
        threading.Event().wait()
    raise AssertionError("only a signal ends the wait")
