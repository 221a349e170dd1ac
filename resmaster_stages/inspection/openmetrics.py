"""Gives a dataset's numbers as OpenMetrics text, for Prometheus and similar tools. Reads only the store.

Counters are computed from commit records, the ledger and the records of failed attempts, so they do not depend on any
server or process. They fall only if commit records are deleted or the configuration changes, which readers of counters
treat as a restart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest

from resmaster_stages.dataset.attempts import failed_names
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.ledger import ledger_rows
from resmaster_stages.dataset.plan import Plan
from resmaster_stages.inspection.status import stage_status
from resmaster_stages.redaction import printable


def openmetrics(dataset: Dataset) -> str:
    """The text of one scrape. Raises PlanError without a plan.

    Shards whose commit record cannot be read count as damaged, and their samples as pending.
    """
    families = _Families()
    plan = dataset.plan
    name = dataset.config.name
    families.shards_planned.add_metric([name], plan.shards)
    families.samples_planned.add_metric([name], plan.samples)
    pixels = plan.pixels() * dataset.config.upscale.scale**2 / max(1, plan.samples)
    for stage in dataset.hashes:
        _add_stage(families, [name, stage], plan, dataset.commits(stage), pixels / 1e6)
    registry = CollectorRegistry()
    registry.register(families)
    text: bytes = generate_latest(registry)
    return text.decode()


class _Families:
    """The metrics of one scrape, empty at first."""

    def __init__(self) -> None:
        def gauge(name: str, text: str, *labels: str, unit: str = "") -> GaugeMetricFamily:
            return GaugeMetricFamily(f"resmaster_{name}", text, labels=["dataset", *labels], unit=unit)

        def counter(name: str, text: str, *labels: str, unit: str = "") -> CounterMetricFamily:
            return CounterMetricFamily(f"resmaster_{name}", text, labels=["dataset", *labels], unit=unit)

        self.shards_planned = gauge("planned_shards", "Shards of the plan.")
        self.samples_planned = gauge("planned_samples", "Samples of the plan.")
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

    def collect(self) -> list[Metric]:
        """The metrics; called by the registry. Values of labels come from records, which may hold anything."""
        families: list[Metric] = list(vars(self).values())
        for family in families:
            family.samples = [
                sample._replace(labels={name: printable(value) for name, value in sample.labels.items()})
                for sample in family.samples
            ]
        return families


def _add_stage(families: _Families, labels: list[str], plan: Plan, commits: Commits, megapixels: float) -> None:
    """Add the numbers of one stage. labels: dataset and stage. megapixels: of a mean high-res image."""
    numbers = commits.numbers()
    plan.require(max((shard + 1 for shard in numbers), default=0))
    receipts, unreadable = commits.read_some(numbers)
    rows, attempts = ledger_rows(commits), failed_names(commits)
    for error_class, count in sorted(Counter(attempt.error_class for attempt in attempts).items()):
        families.failed_attempts.add_metric([*labels, error_class], count)
    families.damaged.add_metric(labels, len({*commits.marked(), *unreadable}))
    missing = set(range(plan.shards)) - numbers.keys()
    failed = missing & {attempt.shard for attempt in attempts}
    found = stage_status(labels[1], receipts.values(), missing, rows, failed)
    found = replace(found, committed=found.committed + len(unreadable))
    for state in ("committed", "pending", "failed"):
        families.shards.add_metric([*labels, state], getattr(found, state))
    undecided = plan.samples - found.samples_ok - found.samples_failed
    for state, count in (("ok", found.samples_ok), ("failed", found.samples_failed), ("pending", undecided)):
        families.samples.add_metric([*labels, state], count)
    for error_class, count in sorted(Counter(row["error_class"] for row in rows).items()):
        families.failures.add_metric([*labels, error_class], count)
    families.retries.add_metric(labels, sum(row["attempt_number"] > 1 for row in rows))
    families.seconds.add_metric(labels, found.seconds)
    on_gpu: Counter[str] = Counter()
    for receipt in receipts.values():
        if "gpu" in receipt.provenance:
            on_gpu[str(receipt.provenance["gpu"])] += receipt.seconds  # type: ignore[assignment]
    for gpu, seconds in sorted(on_gpu.items()):
        families.gpu_seconds.add_metric([*labels, gpu], seconds)
    tried = sum(receipt.samples_ok + receipt.samples_failed for receipt in receipts.values())
    if tried:
        families.pace.add_metric(labels, found.seconds / (tried * megapixels))
        latest = max(datetime.fromisoformat(receipt.finished_at) for receipt in receipts.values())
        families.last.add_metric(labels, latest.timestamp())
    views = sum(receipt.provenance.get("unet", {}).get("native_rows", 0.0) for receipt in receipts.values())
    families.unet_views.add_metric(labels, views)
    size = sum(stored.bytes for receipt in receipts.values() for stored in receipt.objects)
    families.bytes.add_metric(labels, size)
