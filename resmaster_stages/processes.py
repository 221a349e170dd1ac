"""Names running processes, so that another process can tell whether one still lives. Linux tells it exactly."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def process_name(pid: int | None = None) -> str:
    """Host, pid and start of a process (default: this one): no other one, before or after, has the same name."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {pid} {_start_of(pid)}"


def lives(name: str) -> bool:
    """Whether the process of that name runs on this very host. One on another host counts as dead: nobody can tell."""
    host, _, pid = name.rpartition(" ")[0].rpartition(" ")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # there, but another user's
    return process_name(int(pid)) == name


def _start_of(pid: int) -> str:
    """Clock ticks from boot to the start of a process; "-" if it has ended, or where there is no /proc."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "-"
    return "-" if state in ("Z", "X") else facts[18]
