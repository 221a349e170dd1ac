"""A socket on this machine's loopback address, for the servers of pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from resmaster_stages.errors import UserError

HOST = "127.0.0.1"


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens on `port`, 0 for any free one. Connections wait until somebody accepts them.

    Raises UserError if the port is taken.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"port {port} cannot be used ({reason}); choose another --port, or leave it out") from error
        listener.listen(128)
        yield listener
