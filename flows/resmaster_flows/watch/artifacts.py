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
import time
from collections import Counter
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

from resmaster_flows.watch.decisions import decisions
from resmaster_flows.watch.page import headline, lines, table
from resmaster_flows.watch.progress import Progress, notes
from resmaster_flows.watch.samples import Samples
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.failures import failures
from resmaster_stages.inspection.status import Status, pending_samples
from resmaster_stages.keys import digest
from resmaster_stages.progress import Listener, Note, emit, listening
from resmaster_stages.publish.links import report_page
from resmaster_stages.publish.page import SIDES_PX, data_url
from resmaster_stages.publish.summary import summary
from resmaster_stages.redaction import printable
from resmaster_stages.storage.images import decode_image

INTERVAL_SECONDS = 5.0
"""Time between two updates."""
CLOSE_SECONDS = 15.0
"""Time that a run waits at its end for the last update."""
KEY_DIGITS = 6
"""Digits of the digest of the dataset's URL in the keys of its artifacts."""
SHEET_BYTES = 180_000
"""Size limit of a contact sheet. The image is inside the artifact, so that no file server is needed."""
SHEET = "low-res beside high-res, worst first"
COUNT_SECONDS = 60.0
"""Least time between two counts of failed samples. Each reads the ledgers of the dataset."""


@dataclass(frozen=True)
class Shown:
    """The current state of one artifact."""

    key: str
    """Lower-case letters, digits and dashes. Artifacts with one key are versions of each other."""
    type: str
    data: Any
    description: str = ""


class Publisher:
    """Sends the artifacts that `renders` return to the current flow run's page, in a thread, until the block ends."""

    def __init__(
        self,
        *renders: Callable[[], Sequence[Shown]],
        tags: Sequence[str] = (),
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        """Must be created inside a flow run. `tags` are added to the tags of the run, not to those of its tasks."""
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise RuntimeError("artifacts belong to a flow run, and there is none")
        self._renders = renders
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
        for render in self._renders:
            with self._forgiving("the page"):
                for shown in render():
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


def log(line: str) -> None:
    """Write a line to the log on the current flow run's page, if there is one."""
    if FlowRunContext.get() is not None:
        get_run_logger().info(printable(line))


@contextmanager
def run_page(dataset: Dataset, todo: Mapping[str, Sequence[int]], *, part: bool = False) -> Iterator[None]:
    """Within the block, show progress on the current flow run's page. `todo`: stage -> shards.

    part: the run is one of many runs of a build. Some of its `todo` may already be done, its events are logged, and its
    artifacts have keys of their own. Without a flow run there is no page, and nothing is shown.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        yield
        return
    if not part:  # for the terminal, if there is one
        emit(Note(f"page of this build: {url_for(context.flow_run) or context.flow_run.id}"))
    logger = get_run_logger()
    shards = sorted({shard for missing in todo.values() for shard in missing})
    progress, samples = Progress(pending_samples(dataset, todo), shards, reckoned=part), Samples()
    elsewhere = FailedElsewhere(dataset, progress)
    kind = "run-" if part else ""
    keys = [key_of(dataset, kind + what) for what in ("progress", "shards", "samples")]

    def count() -> list[Shown]:
        elsewhere.count()
        return []

    def show_progress() -> list[Shown]:
        line = headline(progress)
        return [
            Shown(keys[0], "progress", progress.percent, line),
            Shown(keys[1], "table", json.dumps(table(progress)), line),
        ]

    def show_samples() -> list[Shown]:
        page = samples.page()
        return [Shown(keys[2], "markdown", page, "samples as they are made")] if page else []

    heard: list[Listener] = [progress.hear]
    heard += [samples.hear, lines(progress, logger.info), notes(logger.info)] if part else [decisions(logger.info)]
    with Publisher(count, show_progress, show_samples, tags=tags_of(dataset.config)), ExitStack() as listened:
        for listener in heard:
            listened.enter_context(listening(listener))
        listened.callback(progress.end)  # before the last look
        yield


class FailedElsewhere:
    """Counts the failed samples of shards that other processes work on, and gives them to `progress`."""

    def __init__(self, dataset: Dataset, progress: Progress) -> None:
        self._dataset, self._progress = dataset, progress
        self._counted: object = None
        self._due = 0.0

    def count(self) -> None:
        """Count anew if the work has gone on since the last time, at most every `COUNT_SECONDS`, and at the end."""
        progress = self._progress
        now = (progress.dispatched and progress.dispatched.done, [run.state for run in list(progress.runs.values())])
        if progress.dispatched is None or now == self._counted or (time.monotonic() < self._due and not progress.ended):
            return
        found = Counter(row["shard"] for row in failures(self._dataset))
        progress.failed_elsewhere = {shard: found[shard] for shard in sorted(found) if shard in progress.shards}
        self._counted, self._due = now, time.monotonic() + COUNT_SECONDS


def show_dataset(dataset: Dataset, found: Status) -> None:
    """Show the published dataset's summary and contact sheet on the current flow run's page, if there is one."""
    if FlowRunContext.get() is None:
        return

    def show_summary() -> list[Shown]:
        return [Shown(key_of(dataset, "summary"), "markdown", summary(dataset, found), "what the build came to")]

    def show_report() -> list[Shown]:
        return [Shown(key_of(dataset, "report"), "markdown", page, "open the report, or look through all samples")]

    def show_sheet() -> list[Shown]:
        sheet = layout.contact_sheet(0)
        if not dataset.folder.exists(sheet):
            return []
        url = data_url(decode_image(dataset.folder.read(sheet), sheet), SHEET_BYTES, (2048, *SIDES_PX))
        # Markdown, because the UI writes the address of an artifact of type `image` across its page
        return [Shown(key_of(dataset, "contact-sheet"), "markdown", f"![contact sheet]({url})", SHEET)]

    page = report_page(dataset)
    with Publisher(show_summary, show_report, show_sheet):
        pass
