"""Flow `compare`: does what `resmaster compare` does, started from a server. Builds its datasets like any other."""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from resmaster_flows import form
from resmaster_flows.build import build_dataset
from resmaster_flows.calls import call
from resmaster_flows.form import Source
from resmaster_flows.outcome import incomplete
from resmaster_flows.server_runs import cancel_children
from resmaster_flows.watch.progress import plans
from resmaster_flows.workplace import computed_here
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.evaluation.compare import compare
from resmaster_stages.planning.checks import Around
from resmaster_stages.progress import listening


def _run_name() -> str:
    parameters = flow_run.parameters
    return f"compare {form.run_name(parameters)}: {parameters['methods']}"


@flow(name="compare", flow_run_name=_run_name, on_cancellation=[cancel_children], validate_parameters=False)
def compare_methods(
    config: Source,
    methods: str,
    scales: str = "4x4",
    reference: str | None = None,
    low_res: Literal["generated", "drawn"] = "generated",
) -> str | State[Any]:
    """Build the same samples by several methods, and measure them together.

    Args:
        config: a shipped configuration (`picturebook`, `sdxl-4k`, ...), a YAML file (path or URL), the URL of an
            earlier dataset, or a whole configuration.
        methods: comma-separated, e.g. `multidiffusion,resmaster+sg,resmaster`.
        scales: height x width in native sizes, comma-separated, e.g. `2x2,4x4`.
        reference: real images for FID and KID: a folder, shards, or `picturebook`; default: the low-res images.
        low_res: `drawn`: picturebook's prompts are drawn by vectors at the low-res size, so that the true enlargement
            of each image is known.

    Returns the URL of the page with the tables.
    """

    wanted = form.configuration(config, {})

    def build(variant: DatasetConfig) -> bool:
        return bool(call(build_dataset, variant, read_input=False).finished)

    with listening(plans(get_run_logger().info)):
        around = Around(computed_here(wanted.dispatch))
        found = compare(wanted, methods, scales, build, around=around, reference=reference, low_res=low_res)
    if found.finished:
        return found.page
    return incomplete(f"some shards are missing; the others are compared in {found.page}", found.page)
