"""Serves the metrics of a dataset, or of all datasets of a root, over HTTP for Prometheus.

A thread looks at the datasets every few seconds and keeps what it has read, so that a later look costs listings and
the records that are new. A scrape asks nothing of the store: it gets what the last look has found. A dataset appears
when all of its records are read. While the store does not answer, the last numbers stay, and the time of the last look
does not move on.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.inspection.known import Known
from resmaster_stages.inspection.numbers import DatasetNumbers
from resmaster_stages.inspection.openmetrics import Families
from resmaster_stages.inspection.overview import THREADS, NoDataset, folders_below, look
from resmaster_stages.redaction import one_line, without_credentials
from resmaster_stages.storage.filesystem import Folder


class Exporter:
    """The metrics of a place, as of the last look. A collector of prometheus_client."""

    def __init__(self, place: Dataset | Folder) -> None:
        self._place = place
        self._known = Known()
        self._found: dict[str, DatasetNumbers | NoDataset | None] = {}
        self._looked: tuple[float, float] | None = None
        """When the last look that reached the store ended (Unix time), and how many seconds it took."""
        self._said: set[str] = set()

    def look(self) -> None:
        """Look at the datasets. What goes wrong is said on stderr, each line once until it is over."""
        start, said = time.monotonic(), set()
        try:
            folders = self._folders()
            with ThreadPoolExecutor(THREADS, "metrics") as threads:
                looks = threads.map(lambda folder: look(folder, self._known, None, pixels=True), folders.values())
                for name, found in zip(folders, looks, strict=True):
                    self._found[name] = found
                    if isinstance(found, NoDataset):
                        said.add(found.line)
            self._found = {name: self._found[name] for name in folders}
            self._looked = time.time(), time.monotonic() - start
        except (ResMasterError, OSError) as error:
            said.add(one_line(error))
        for line in sorted(said - self._said):
            print(f"metrics: {line}", file=sys.stderr, flush=True)
        self._said = said

    def _folders(self) -> dict[str, Folder]:
        """Name -> folder of what is looked at."""
        if isinstance(self._place, Dataset):
            return {self._place.url.rpartition("/")[2]: self._place.folder}
        return {name: self._place.sub(name) for name in folders_below(self._place)}

    def collect(self) -> Iterable[Metric]:
        """The metrics; called at each scrape."""
        families = Families()
        root = self._place.url.rpartition("/")[0] if isinstance(self._place, Dataset) else self._place.url
        for name, found in self._found.copy().items():
            if isinstance(found, DatasetNumbers):
                families.add(found)
            elif isinstance(found, NoDataset) and not found.foreign:
                families.add_unreadable(name, root)
        yield from families.collect()
        if self._looked is not None:
            for name, text, value in (
                ("look_timestamp", "When the root was last looked at (Unix time).", self._looked[0]),
                ("look", "How long the last look took.", self._looked[1]),
            ):
                family = GaugeMetricFamily(f"resmaster_{name}_seconds", text, labels=["root"], unit="seconds")
                family.add_metric([without_credentials(root)], value)
                yield family


@contextmanager
def serving_metrics(place: Dataset | Folder, host: str, port: int, every_seconds: float) -> Iterator[str]:
    """Within the block, the yielded address answers with the metrics of `place`, which threads look at again and again.

    port: 0 for any free one. Raises UserError if host or port cannot be used.
    """
    exporter, registry, ended = Exporter(place), CollectorRegistry(auto_describe=False), threading.Event()
    registry.register(exporter)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"--serve {host}:{port} cannot be used ({reason}); choose another port or address") from error

    def keep_looking() -> None:
        while not ended.is_set():
            exporter.look()
            ended.wait(every_seconds)

    looking = threading.Thread(target=keep_looking, name="metrics-look", daemon=True)
    looking.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_port}/metrics"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
