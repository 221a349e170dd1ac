"""Sends artifacts to a flow run's page in the Prefect UI: progress, table, summary, contact sheet, tags.

Invariants:
- The build does not wait for artifacts: a separate thread renders, compares and sends them, at most every few seconds.
- An artifact is created once and then updated in place. An unchanged artifact is not sent again.
- An error in this module never fails a build. The first error of each artifact is logged.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.utilities.urls import url_for

from resmaster_flows.watch.page import headline, lines, table
from resmaster_flows.watch.progress import Progress, notes
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.status import Status, pending_samples
from resmaster_stages.keys import digest
from resmaster_stages.progress import listening
from resmaster_stages.publish.page import SIDES_PX, data_url
from resmaster_stages.publish.summary import summary
from resmaster_stages.storage.images import decode_image

INTERVAL_SECONDS = 5.0
"""Time between two updates."""
CLOSE_SECONDS = 15.0
"""Time that a run waits at its end for the last update."""
KEY_DIGITS = 6
"""Digits of the digest of the dataset's URL in the keys of its artifacts."""
SHEET_BYTES = 180_000
"""Size limit of a contact sheet. The image is inside the artifact, so that no file server is needed."""


@dataclass(frozen=True)
class Shown:
    """The current state of one artifact."""

    key: str
    """Lower-case letters, digits and dashes. Artifacts with one key are versions of each other."""
    type: str
    data: Any
    description: str = ""


class Publisher:
    """Sends the artifacts that `render` returns to the current flow run's page, in a thread, until the block ends."""

    def __init__(
        self,
        render: Callable[[], Sequence[Shown]],
        tags: Sequence[str] = (),
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        """Must be created inside a flow run. `tags` are added to the tags of the run, not to those of its tasks."""
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise RuntimeError("artifacts belong to a flow run, and there is none")
        self._render = render
        self._run = context.flow_run.id
        self._tags = [] if set(tags) <= set(context.flow_run.tags) else sorted({*context.flow_run.tags, *tags})
        self._interval = interval
        self._sent: dict[str, tuple[UUID, Shown]] = {}
        self._warned: set[str] = set()
        self._log: logging.Logger | logging.LoggerAdapter[Any] = get_run_logger()
        self._closing = threading.Event()
        settings = contextvars.copy_context()  # the context says which server to use
        self._thread = threading.Thread(target=settings.run, args=(self._work,), name="artifacts", daemon=True)

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._log.warning("artifacts: the server does not answer; the run's page may lack its last state")

    def _work(self) -> None:
        with self._forgiving("the page"), get_client(sync_client=True) as client:
            if self._tags:
                with self._forgiving("tags"):
                    client.update_flow_run(self._run, tags=self._tags)
            while not self._closing.wait(self._interval):
                self._look(client)
            self._look(client)

    def _look(self, client: SyncPrefectClient) -> None:
        with self._forgiving("the page"):
            for shown in self._render():
                with self._forgiving(shown.key):
                    self._send(client, shown)

    def _send(self, client: SyncPrefectClient, shown: Shown) -> None:
        known = self._sent.get(shown.key)
        if known is None:
            created = client.create_artifact(
                ArtifactCreate(
                    key=shown.key,
                    type=shown.type,
                    data=shown.data,
                    description=shown.description,
                    flow_run_id=self._run,
                )
            )
            self._sent[shown.key] = (created.id, shown)
        elif known[1] != shown:
            client.update_artifact(known[0], ArtifactUpdate(data=shown.data, description=shown.description))
            self._sent[shown.key] = (known[0], shown)

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        """Suppress errors within the block, and log the first error for each `what`."""
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                self._log.warning("artifacts: %s cannot be shown: %s: %s", what, type(error).__name__, error)


def key_of(dataset: Dataset, what: str) -> str:
    """The key of an artifact of a dataset. Datasets whose names are spelled alike, or under other roots, differ."""
    slug = re.sub("[^a-z0-9]+", "-", dataset.config.name.lower())
    return f"{slug}-{digest(dataset.url)[:KEY_DIGITS]}-{what}".strip("-")


def tags_of(config: DatasetConfig) -> list[str]:
    """The tags by which a run is found in the UI."""
    return [f"dataset:{config.name}", f"method:{config.upscale.method}", f"model:{config.model.id}"]


@contextmanager
def run_page(dataset: Dataset, todo: Mapping[str, Sequence[int]], *, part: bool = False) -> Iterator[None]:
    """Within the block, show progress on the current flow run's page. `todo`: stage -> shards.

    part: the run is one of many runs of a build. Some of its `todo` may already be done, its events are logged, and its
    artifacts have keys of their own. Without a flow run there is no page, and nothing is shown.
    """
    if FlowRunContext.get() is None:
        yield
        return
    logger = get_run_logger()
    shards = sorted({shard for missing in todo.values() for shard in missing})
    progress = Progress(pending_samples(dataset, todo), shards, reckoned=part)
    kind = "run-" if part else ""
    keys = [key_of(dataset, kind + what) for what in ("progress", "shards")]

    def render() -> list[Shown]:
        line = headline(progress)
        return [
            Shown(keys[0], "progress", progress.percent, line),
            Shown(keys[1], "table", json.dumps(table(progress, _address)), line),
        ]

    with Publisher(render, tags_of(dataset.config)), listening(progress.hear), ExitStack() as logged:
        if part:
            logged.enter_context(listening(lines(progress, logger.info)))
            logged.enter_context(listening(notes(logger.info)))
        logged.callback(progress.end)  # before the last look
        yield


def _address(run: str) -> str:
    return url_for("flow-run", obj_id=run) or run


def show_dataset(dataset: Dataset, found: Status) -> None:
    """Show the published dataset's summary and contact sheet on the current flow run's page, if there is one."""
    if FlowRunContext.get() is None:
        return

    def render() -> Iterator[Shown]:
        yield Shown(key_of(dataset, "summary"), "markdown", summary(dataset, found), "what the build came to")
        sheet = layout.contact_sheet(0)
        if dataset.folder.exists(sheet):
            image = decode_image(dataset.folder.read(sheet), sheet)
            url = data_url(image, SHEET_BYTES, (2048, *SIDES_PX))
            yield Shown(key_of(dataset, "contact-sheet"), "image", url, "low-res beside high-res, worst first")

    with Publisher(lambda: list(render())):
        pass
