"""A Prefect server for flows that run in the test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.context import _temporary_global_settings_context, get_settings_context
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.server.conftest import Stack, wait

DRAIN_SECONDS = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty server. Prefect's own harness gives up on one that answers slowly at first, and may wait for ever at its
    end."""
    stack = Stack(tmp_path_factory.mktemp("prefect"))
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port), "--no-ui")
    try:
        wait(stack.healthy, seconds=300)
        # the second one for threads that take their settings from the process
        with (
            temporary_settings({PREFECT_API_URL: stack.api}),
            _temporary_global_settings_context(get_settings_context()),
        ):
            yield
            APILogWorker.drain_all(timeout=DRAIN_SECONDS)
            EventsWorker.drain_all(timeout=DRAIN_SECONDS)
    finally:
        stack.kill("server")
