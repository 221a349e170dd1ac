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
from prefect.runtime import flow_run
from prefect.states import Cancelled

from resmaster_flows import form
from resmaster_flows.calls import call
from resmaster_flows.clusters import process_on_cluster
from resmaster_flows.dispatch import Stopped, dispatch
from resmaster_flows.form import AS_CONFIGURED, MethodName, PresetName, Source
from resmaster_flows.outcome import incomplete, skipped, told
from resmaster_flows.plugins import load_plugins
from resmaster_flows.process import failures, process_shards
from resmaster_flows.selection import parse_numbers
from resmaster_flows.server_runs import (
    REPAIR_QUEUE,
    ServerRuns,
    cancel_children,
    dataset_url_of,
    deployed,
    label_dataset,
    other_build,
)
from resmaster_flows.watch.artifacts import log, run_page, show_dataset
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
from resmaster_stages.inspection.limits import Limits, end_of_hours, left
from resmaster_stages.inspection.shortfall import shortfall
from resmaster_stages.inspection.status import pending, pending_samples, status
from resmaster_stages.planning.checks import Around, check_stages
from resmaster_stages.planning.redoing import asked
from resmaster_stages.progress import emit, listening
from resmaster_stages.prompts import ingest
from resmaster_stages.publish import publish as publishing
from resmaster_stages.publish.card import Publication
from resmaster_stages.redaction import without_credentials
from resmaster_stages.storage.probe import require_one_winner

load_plugins()

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]  # Prefect's form for the flow's parameters then offers a choice

TO_GO_ON = "run the same command again with a higher limit to go on"

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
    limit: str = ""
    """Which limit of money or hours ended the build, and what it left; "" if none did."""
    spent: str = ""
    """What the dataset has cost so far, in words."""

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return not self.errors and not self.shortfall and not self.limit


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
    dataset: Dataset,
    todo: Todo,
    look: Callable[[], Todo],
    limits: Limits,
    retries: Retries | None = None,
    queue: str | None = None,
) -> dict[str, str]:
    """Process the shards in `todo` (stage -> shards), on workers, on a cluster or in this process.

    look: reads from the dataset again what is to do. Returns shard number -> error, for each shard that could not be
    finished. Shards that are not begun because of a limit are absent.
    """
    config = dataset.config.dispatch
    shards = sorted(_lacking(todo))
    emit(WorkFound(pending_samples(dataset, todo), shards))
    stages = None if todo.keys() == dataset.hashes.keys() else list(todo)  # None: all stages
    log(_spell_work(dataset, todo, shards))
    with run_page(dataset, todo):
        if not shards:
            return {}
        if not computed_here(config):
            lacking = [stage for stage, missing in todo.items() if missing]
            check_stages(dataset.config, lacking, here=False)
        if config.where == "dask" or config.where == "ray":
            return process_on_cluster(dataset, shards, stages, retries, config.where, limits.until)
        if not on_workers(config):
            errors: dict[str, str] = call(process_shards, dataset.url, shards, stages, retries, limits.until)
            return errors
        runs = ServerRuns(config, dataset.url, stages, retries, queue, limits)
        missing = dispatch(runs, lambda: _lacking(look()), config, _lacking(todo))
    return {str(shard): error for shard, error in missing.items()}


def _spell_work(dataset: Dataset, todo: Todo, shards: list[int]) -> str:
    """How much there is to do, and how much is done already, in one line."""
    total = dataset.plan.shards
    if not shards:
        return f"nothing to do for {total} shards: everything asked for is committed"
    each = ", ".join(f"{stage} {len(missing)}" for stage, missing in todo.items() if missing)
    return f"{len(shards)} of {total} shards to do ({each}); {total - len(shards)} need nothing"


def _lacking(todo: Todo) -> Counter[int]:
    """Shard -> number of commits that the shard lacks. Finished shards are absent."""
    return Counter(shard for missing in todo.values() for shard in missing)


def finish(
    dataset: Dataset, errors: dict[str, str], look: Callable[[], Todo], limits: Limits
) -> BuildResult | State[BuildResult]:
    """Publish what is committed and return the result. If shards or too many samples are missing, the flow run ends as
    `Incomplete`.

    errors: shard number -> error. look: gives stage -> shards, of what is not done.
    """
    published = call(publish_dataset, dataset)
    found = status(dataset)
    todo = look() if limits.given else {}
    not_tried = _lacking(todo).keys() - {int(shard) for shard in errors}
    limit = limits.reached() if not_tried else ""
    report_url = dataset.folder.url_of(layout.REPORT_PAGE)
    log(f"published {published.samples} samples; report: {without_credentials(report_url)}")
    show_dataset(dataset, found)
    result = BuildResult(
        dataset_url=dataset.url,
        report_url=report_url,
        samples=published.samples,
        samples_failed=sum(stage.samples_failed for stage in found.stages),
        errors=errors,
        shortfall="" if errors else shortfall(dataset, found),
        limit=f"stopped: {limit}; {left(dataset, todo, found)}; {TO_GO_ON}" if limit else "",
        spent=found.spent.line(),
    )
    if result.finished:
        return result
    return incomplete(failures(errors) if errors else result.shortfall or result.limit, result)


def _run_name() -> str:
    return f"build {form.run_name(flow_run.parameters)}"


@flow(name="build-dataset", flow_run_name=_run_name, on_cancellation=[cancel_children], validate_parameters=False)
@told
def build_dataset(
    config: Source = "",
    name: str = "",
    root: str = "",
    input: str = "",
    model: str = "",
    method: MethodName = AS_CONFIGURED,
    preset: PresetName = AS_CONFIGURED,
    scale: float = 0,
    limit: int = 0,
    price: float = 0,
    read_input: bool = True,
    advanced: str = "",
) -> BuildResult | State[BuildResult]:
    """Build a dataset, or continue it: plan, run every stage over every shard that is not committed, publish.

    Args:
        config: Start from this: a shipped configuration (`picturebook`, `sdxl-4k`, `flux-4k`, ...), a YAML file (path
            or URL), or the URL of an earlier dataset. The fields below change it.
        name: Name of the dataset. Empty: the configuration's.
        root: Folder or s3://bucket/prefix for the dataset. Empty: the configuration's, or the root that was deployed.
        input: Prompts (.txt, .csv, .jsonl, .parquet) or your own low-res images (a folder, .tar): whole path or URL.
            Empty: the configuration's.
        model: Base model: `picturebook`, a hub id or a folder. Empty: the configuration's.
        method: Method that enlarges the images.
        preset: Preset of the method. `faithful` is what the method's authors published; not every method has each.
        scale: Factor of the enlargement, e.g. 4. 0: the configuration's.
        limit: Only the first prompts or images, as many as this. 0: the configuration's.
        price: Price of one hour of one worker, to tell costs. 0: the configuration's.
        read_input: Read the prompts or images again and plan new ones. Off: build only what is planned already.
        advanced: Anything else of a configuration, in YAML, e.g. `low_res: {steps: 30}`. It has the last word.
    """
    first = {"name": name, "root": root, "input": input, "model": model, "method": method}
    config = form.configuration(
        config, {**first, "preset": preset, "scale": scale, "limit": limit, "price": price}, advanced
    )
    dataset_url = dataset_url_of(config.root, config.name)
    label_dataset(dataset_url)
    if other := other_build(config.dispatch, dataset_url):
        return skipped(other)
    if on_workers(config.dispatch):
        deployed(config.dispatch)  # raises before anything is planned
    until = end_of_hours(config.dispatch)
    dataset = call(plan_dataset, config, read_input)
    limits = Limits(dataset, until)

    def look() -> Todo:
        return pending(dataset)

    try:
        errors = work(dataset, look(), look, limits)
    except Stopped:
        return Cancelled(message="its runs were cancelled")
    return finish(dataset, errors, look, limits)


@flow(name="repair", flow_run_name="repair {dataset_url}", on_cancellation=[cancel_children])
@told
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
    limits = Limits(dataset, end_of_hours(dataset.config.dispatch))
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
        errors = work(dataset, look(), look, limits, retries, REPAIR_QUEUE)
    except Stopped:
        return Cancelled(message="its runs were cancelled")
    return finish(dataset, {**errors, **{str(shard): why for shard, why in hindered.items()}}, look, limits)


@flow(name="publish", flow_run_name="publish {dataset_url}")
@told
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
