"""Gives datasets' numbers as OpenMetrics text, for Prometheus and similar tools. Reads only the store.

Counters are computed from commit records, the ledger and the records of failed attempts, so they do not depend on any
server or process. They fall only if commit records are deleted or the configuration changes, which readers of counters
treat as a restart. Every record is read, because counters may not be estimates.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.inspection.known import Known
from resmaster_stages.inspection.numbers import DatasetNumbers, StageNumbers, dataset_numbers
from resmaster_stages.inspection.overview import NoDataset, folders_below, look
from resmaster_stages.redaction import printable, without_credentials
from resmaster_stages.storage.filesystem import Folder


def openmetrics(place: Dataset | Folder) -> str:
    """The text of one scrape: of a dataset, or of all datasets directly below a root.

    Raises PlanError for a dataset without a plan. Below a root, datasets that cannot be read are told to be so.
    Shards whose commit record cannot be read count as damaged, and their samples as pending.
    """
    families = Families()
    if isinstance(place, Dataset):
        families.add(dataset_numbers(place, place.folder.names(""), Known(), None, pixels=True))
    else:
        known = Known()
        for name in folders_below(place):
            found = look(place.sub(name), known, None, pixels=True)
            if isinstance(found, DatasetNumbers):
                families.add(found)
            elif isinstance(found, NoDataset) and not found.foreign:
                families.add_unreadable(name, place.url)
    return text_of(families)


def text_of(families: Families) -> str:
    """Metrics as OpenMetrics text."""
    registry = CollectorRegistry()
    registry.register(families)
    text: bytes = generate_latest(registry)
    return text.decode()


class Families:
    """The metrics of one scrape, empty at first."""

    def __init__(self) -> None:
        def gauge(name: str, text: str, *labels: str, unit: str = "") -> GaugeMetricFamily:
            return GaugeMetricFamily(f"resmaster_{name}", text, labels=["root", "dataset", *labels], unit=unit)

        def counter(name: str, text: str, *labels: str, unit: str = "") -> CounterMetricFamily:
            return CounterMetricFamily(f"resmaster_{name}", text, labels=["root", "dataset", *labels], unit=unit)

        self.readable = gauge("dataset_readable", "1 if the dataset can be read, else 0.")
        self.shards_planned = gauge("planned_shards", "Shards of the plan.")
        self.samples_planned = gauge("planned_samples", "Samples of the plan.")
        self.complete = gauge("complete", "1 if all is committed, whole, and nothing is to be made again, else 0.")
        self.flagged = gauge("flagged_samples", "Published samples with flags.")
        self.rejected = gauge("rejected_samples", "Samples that somebody rejected.")
        self.stall = gauge("stall_seconds", "dispatch.stall_seconds of the configuration.", unit="seconds")
        self.price = gauge("price", "dispatch.price of the configuration: of one hour of one worker.")
        self.cost = gauge("cost", "Compute hours of the commits that count, by the price.")
        self.max_cost = gauge("max_cost", "dispatch.max_cost of the configuration.")
        self.shards = gauge("shards", "Shards by state: committed, pending or failed.", "stage", "state")
        self.damaged = gauge("damaged_shards", "Committed shards that verify has found damaged.", "stage")
        self.failed_attempts = counter(
            "failed_attempts", "Attempts at a stage of a shard that ended by an error.", "stage", "error_class"
        )
        self.samples = gauge("samples", "Samples by state: ok, failed or pending.", "stage", "state")
        self.failures = counter("sample_failures", "Rows of the ledger: failures of samples.", "stage", "error_class")
        self.retries = counter("sample_retries", "Failures of samples that had failed before.", "stage")
        self.seconds = counter("compute_seconds", "Compute time of commits.", "stage", unit="seconds")
        self.gpu_seconds = counter("gpu_seconds", "Compute time of commits on a GPU.", "stage", "gpu", unit="seconds")
        self.pace = gauge(
            "seconds_per_megapixel", "Compute time of commits over the megapixels of their high-res images.", "stage"
        )
        self.unet_views = counter("unet_views", "UNet evaluations of commits, in native views.", "stage")
        self.bytes = gauge("stored_bytes", "Size of the objects that commits name.", "stage", unit="bytes")
        self.last = gauge(
            "last_commit_timestamp_seconds", "When the last commit was made (Unix time).", "stage", unit="seconds"
        )

    def add(self, numbers: DatasetNumbers) -> None:
        """Add the numbers of a dataset, of which all records were read."""
        labels, publication = [without_credentials(numbers.root), numbers.name], numbers.publication
        self.readable.add_metric(labels, 1)
        self.shards_planned.add_metric(labels, numbers.shards)
        self.samples_planned.add_metric(labels, numbers.samples)
        self.complete.add_metric(labels, numbers.complete)
        self.stall.add_metric(labels, numbers.stall_seconds)
        self.rejected.add_metric(labels, publication.rejected)
        for family, value in (
            (self.flagged, publication.flagged),
            (self.price, numbers.price),
            (self.cost, numbers.cost),
            (self.max_cost, numbers.max_cost),
        ):
            if value is not None:
                family.add_metric(labels, value)
        for stage in numbers.stages:
            self._add_stage([*labels, stage.stage], numbers, stage)

    def add_unreadable(self, name: str, root: str) -> None:
        """Add that a dataset cannot be read."""
        self.readable.add_metric([without_credentials(root), name], 0)

    def _add_stage(self, labels: list[str], numbers: DatasetNumbers, stage: StageNumbers) -> None:
        """Add the numbers of one stage. labels: root, dataset and stage."""
        self.damaged.add_metric(labels, stage.damaged)
        for state in ("committed", "pending", "failed"):
            self.shards.add_metric([*labels, state], getattr(stage, state))
        undecided = numbers.samples - stage.samples_ok - stage.samples_failed
        for state, count in (("ok", stage.samples_ok), ("failed", stage.samples_failed), ("pending", undecided)):
            self.samples.add_metric([*labels, state], count)
        for family, counts in (
            (self.failed_attempts, stage.failed_attempts),
            (self.failures, stage.failures),
            (self.gpu_seconds, stage.gpu_seconds),
        ):
            for label, amount in counts.items():
                family.add_metric([*labels, label], amount)
        self.retries.add_metric(labels, stage.retries)
        self.seconds.add_metric(labels, stage.seconds)
        if stage.tried and stage.last_commit is not None:
            self.pace.add_metric(labels, stage.seconds / (stage.tried * numbers.megapixels))
            self.last.add_metric(labels, stage.last_commit)
        self.unet_views.add_metric(labels, stage.native_rows)
        self.bytes.add_metric(labels, stage.bytes)

    def collect(self) -> Iterable[Metric]:
        """The metrics; called by the registry. Values of labels come from records, which may hold anything."""
        families: list[Metric] = list(vars(self).values())
        for family in families:
            family.samples = [
                sample._replace(labels={name: printable(value) for name, value in sample.labels.items()})
                for sample in family.samples
            ]
        return families
