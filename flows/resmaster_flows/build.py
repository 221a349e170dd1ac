"""Flows `build-dataset`, `repair` and `publish`: plan -> shards -> report.

Invariants:
- The flows are idempotent: a second run does only what is not committed.
- The flows read from the store what is done, at the start and while they wait. They do not look up earlier flow runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from resmaster_flows.calls import call
from resmaster_flows.clusters import process_on_cluster
from resmaster_flows.dispatch import Stopped, dispatch
from resmaster_flows.outcome import incomplete, skipped
from resmaster_flows.plugins import load_plugins
from resmaster_flows.process import failures, process_shards
from resmaster_flows.selection import parse_numbers
from resmaster_flows.server_runs import (
    REPAIR_QUEUE,
    ServerRuns,
    cancel_children,
    dataset_url_of,
    deployed,
    other_build,
)
from resmaster_flows.watch.artifacts import run_page, show_dataset
from resmaster_flows.watch.events import WorkFound
from resmaster_flows.watch.progress import plans
from resmaster_flows.workplace import computed_here, on_workers
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.damage import drop_unreadable_records, give_up_damaged
from resmaster_stages.dataset.dataset import Dataset, open_dataset, planned_dataset
from resmaster_stages.dataset.lost_plan import restore_plan
from resmaster_stages.dataset.retry import Retries, retries_of
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.inspection.shortfall import shortfall
from resmaster_stages.inspection.status import pending, pending_samples, status
from resmaster_stages.planning.checks import Around, check_stages
from resmaster_stages.planning.redoing import asked
from resmaster_stages.progress import emit, listening
from resmaster_stages.prompts import ingest
from resmaster_stages.publish import publish as publishing
from resmaster_stages.publish.card import Publication
from resmaster_stages.storage.probe import require_one_winner

load_plugins()

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]  # Prefect's form for the flow's parameters then offers a choice

Todo = dict[str, list[int]]
"""Stage -> shards that have something to do."""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build."""

    dataset_url: str
    """Folder or URL of the dataset."""
    report_url: str
    """Path or URL of the report."""
    samples: int
    """Samples that are published."""
    samples_failed: int
    """Samples that failed in some stage. The ledger says why."""
    errors: dict[str, str]
    """Number of each shard that could not be finished -> its first error."""
    shortfall: str = ""
    """What `resmaster_flows.shortfall` says of the dataset; "" if there are no missing shards and enough samples."""

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return not self.errors and not self.shortfall


@task(name="plan", cache_policy=NO_CACHE, persist_result=False)
def plan_dataset(config: DatasetConfig, read_input: bool) -> Dataset:
    """Return the dataset. With `read_input`, make the dataset and plan new input; otherwise use the existing plan."""
    if not read_input:
        return planned_dataset(config)
    with listening(plans(get_run_logger().info)):
        return ingest(config, Around(computed_here(config.dispatch)))


@task(name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish_dataset(dataset: Dataset) -> Publication:
    """Write manifest, index, dataset card, report and contact sheets from the commits."""
    return publishing.publish(dataset)


def work(
    dataset: Dataset, todo: Todo, look: Callable[[], Todo], retries: Retries | None = None, queue: str | None = None
) -> dict[str, str]:
    """Process the shards in `todo` (stage -> shards), on workers, on a cluster or in this process.

    look: reads from the dataset again what is to do. Returns shard number -> error, for each shard that is missing.
    """
    config = dataset.config.dispatch
    shards = sorted(_lacking(todo))
    emit(WorkFound(pending_samples(dataset, todo), shards))
    stages = None if todo.keys() == dataset.hashes.keys() else list(todo)  # None: all stages
    with run_page(dataset, todo):
        if not shards:
            return {}
        if not computed_here(config):
            lacking = [stage for stage, missing in todo.items() if missing]
            check_stages(dataset.config, lacking, here=False)
        if config.where == "dask" or config.where == "ray":
            return process_on_cluster(dataset, shards, stages, retries, config.where)
        if not on_workers(config):
            errors: dict[str, str] = call(process_shards, dataset.url, shards, stages, retries)
            return errors
        runs = ServerRuns(config, dataset.url, stages, retries, queue)
        missing = dispatch(runs, lambda: _lacking(look()), config, _lacking(todo))
    return {str(shard): error for shard, error in missing.items()}


def _lacking(todo: Todo) -> Counter[int]:
    """Shard -> number of commits that the shard lacks. Finished shards are absent."""
    return Counter(shard for missing in todo.values() for shard in missing)


def finish(dataset: Dataset, errors: dict[str, str]) -> BuildResult | State[BuildResult]:
    """Publish what is committed and return the result. If shards or too many samples are missing, the flow run ends as
    `Incomplete`."""
    published = call(publish_dataset, dataset)
    found = status(dataset)
    show_dataset(dataset, found)
    result = BuildResult(
        dataset_url=dataset.url,
        report_url=dataset.folder.url_of(layout.REPORT_PAGE),
        samples=published.samples,
        samples_failed=sum(stage.samples_failed for stage in found.stages),
        errors=errors,
        shortfall="" if errors else shortfall(dataset, found),
    )
    if result.finished:
        return result
    return incomplete(failures(errors) if errors else result.shortfall, result)


@flow(
    name="build-dataset",
    flow_run_name="build {config.name}",
    on_cancellation=[cancel_children],
)
def build_dataset(config: DatasetConfig, read_input: bool = True) -> BuildResult | State[BuildResult]:
    """Build a dataset, or continue it: plan, run every stage over every shard that is not committed, publish.

    Args:
        config: what to build and where; see the descriptions of the fields.
        read_input: read the prompts or images again and plan new ones; if off, only what is already planned is built.
    """
    if other := other_build(config.dispatch, dataset_url_of(config.root, config.name)):
        return skipped(other)
    if on_workers(config.dispatch):
        deployed(config.dispatch)  # raises before anything is planned
    dataset = call(plan_dataset, config, read_input)
    try:
        errors = work(dataset, pending(dataset), lambda: pending(dataset))
    except Stopped:
        return Cancelled(message="its runs were cancelled")
    return finish(dataset, errors)


@flow(name="repair", flow_run_name="repair {dataset_url}", on_cancellation=[cancel_children])
def repair(
    dataset_url: str,
    shards: str | None = None,
    stages: list[StageName] | None = None,
    retry_errors: bool = False,
    replace: bool = False,
    redo: str | None = None,
    redo_from: StageName | None = None,
) -> BuildResult | State[BuildResult]:
    """Process only what is missing, failed or marked as damaged in a dataset, then publish it again.

    Args:
        dataset_url: folder or URL of the dataset.
        shards: only these shards, e.g. `1,4-7`; default: all.
        stages: only these stages; default: all.
        retry_errors: also give the failed samples of committed shards another attempt.
        replace: compute damaged shards, and everything made from them, anew with new bytes. If off, a damaged object
            is restored only if it can be made again with the recorded bytes.
        redo: make these samples again with a new seed: keys or their beginnings with commas between them, or the path
            or URL of a .txt, .csv or .parquet file of keys.
        redo_from: with `redo`: the first stage that makes them again; `high_res` keeps the low-res images. Default:
            the first stage that draws by a seed.
    """
    dataset = open_dataset(dataset_url)
    numbers = None if shards is None else parse_numbers(shards, dataset.plan.shards)
    whole = shards is None and stages is None
    if whole and (other := other_build(dataset.config.dispatch, dataset.url)):
        return skipped(other)
    restore_plan(dataset.folder)
    if redo is not None:
        get_run_logger().info(asked(dataset, redo, redo_from))
        dataset = open_dataset(dataset_url)
    retries = retries_of(dataset, numbers, stages)[0] if retry_errors else None
    if not dataset.config.allow_overwriting_store:
        require_one_winner(dataset.folder)
    hindered = drop_unreadable_records(dataset)
    if replace:
        hindered |= give_up_damaged(dataset, numbers)

    def look() -> Todo:
        return pending(dataset, shards=numbers, stages=stages, retries=retries)

    try:
        errors = work(dataset, look(), look, retries, REPAIR_QUEUE)
    except Stopped:
        return Cancelled(message="its runs were cancelled")
    return finish(dataset, {**errors, **{str(shard): why for shard, why in hindered.items()}})


@flow(name="publish", flow_run_name="publish {dataset_url}")
def publish(dataset_url: str) -> str | State[str]:
    """Write manifest, index, dataset card, report and contact sheets again from what is committed.

    Args:
        dataset_url: folder or URL of the dataset.

    Returns the report's URL. If too many samples are missing, the flow run ends as `Incomplete`.
    """
    dataset = open_dataset(dataset_url)
    call(publish_dataset, dataset)
    report = dataset.folder.url_of(layout.REPORT_PAGE)
    lacking = shortfall(dataset, status(dataset))
    return incomplete(lacking, report) if lacking else report
