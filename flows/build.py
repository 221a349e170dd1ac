"""Flow `build-dataset`: plan -> shards -> report. Idempotent: run again, it does only what is not committed."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.process import process_shards
from resmaster_stages.config import DatasetConfig, Stage
from resmaster_stages.gallery import write_report
from resmaster_stages.prompts import ingest
from resmaster_stages.publish import write_manifest
from resmaster_stages.standing import pending, status
from resmaster_stages.storage.dataset import create_or_open, open_dataset


@dataclass(frozen=True)
class BuildResult:
    """What a build ended with."""

    dataset_url: str
    """Folder or URL of the dataset."""
    report_url: str
    """The report to open."""
    samples: int
    """Samples that survived every stage."""
    samples_failed: int
    """Samples that failed in some stage; the ledger says why."""
    errors: dict[str, str]
    """Shards that could not be finished, with the first error of each."""


@task(name="plan", cache_policy=NO_CACHE)
def plan_dataset(config: DatasetConfig) -> str:
    """Write the configuration and the plan, or find them. Returns the dataset's URL."""
    dataset = create_or_open(config)
    ingest(dataset, config)
    return dataset.url


@task(name="publish", cache_policy=NO_CACHE)
def publish_dataset(dataset_url: str) -> str:
    """Manifest, index, dataset card, report and contact sheets from what is committed. Returns the report's URL."""
    dataset = open_dataset(dataset_url)
    write_manifest(dataset)
    return write_report(dataset)


def finish(dataset_url: str, errors: dict[str, str]) -> BuildResult:
    """Publish what is committed and sum up."""
    report_url = publish_dataset(dataset_url)
    stages = status(open_dataset(dataset_url)).stages
    return BuildResult(
        dataset_url=dataset_url,
        report_url=report_url,
        samples=stages[-1].samples_ok,
        samples_failed=sum(stage.samples_failed for stage in stages),
        errors=errors,
    )


@flow(name="build-dataset", flow_run_name="build {config.name}", validate_parameters=False)
def build_dataset(config: DatasetConfig) -> BuildResult:
    """Build a dataset, or go on with it: plan, every stage over every shard that is not committed, report.

    Args:
        config: what to build and where; see the fields' descriptions.
    """
    dataset_url = plan_dataset(config)
    shards = sorted({shard for todo in pending(open_dataset(dataset_url)).values() for shard in todo})
    errors = process_shards(dataset_url, shards) if shards else {}
    return finish(dataset_url, errors)


@flow(name="repair", flow_run_name="repair {dataset_url}", validate_parameters=False)
def repair(dataset_url: str, shards: list[int] | None = None, stages: list[Stage] | None = None) -> BuildResult:
    """Do what is missing or failed in a dataset, and nothing else; then publish anew.

    Args:
        dataset_url: folder or URL of the dataset.
        shards: only these shard numbers; default: all.
        stages: only these stages; default: all.
    """
    todo = pending(open_dataset(dataset_url), shards=shards, stages=stages)
    wanted = sorted({shard for missing in todo.values() for shard in missing})
    errors = process_shards(dataset_url, wanted, stages) if wanted else {}
    return finish(dataset_url, errors)
