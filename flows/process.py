"""Flow `process-shards`: one process, one device; for each shard, for each stage, one task.

Invariants:
- A shard that fails does not stop the others; the flow fails at the end and says which.
- A lost GPU or a wrong configuration ends the flow at once: every other shard would end the same way.
"""

from __future__ import annotations

from prefect import flow

from resmaster_stages.config import STAGES, Stage
from resmaster_stages.errors import ConfigError, GpuLost, ShardError
from resmaster_stages.storage.dataset import open_dataset
from tasks.stages import STAGE_TASKS


@flow(name="process-shards", flow_run_name="process {dataset_url}", validate_parameters=False)
def process_shards(dataset_url: str, shards: list[int], stages: list[Stage] | None = None) -> dict[str, str]:
    """Run every stage over the shards; committed ones return at once.

    Args:
        dataset_url: folder or URL of the dataset (the one that holds config.json).
        shards: shard numbers, as in the plan.
        stages: only these stages, in pipeline order; default: all that the dataset needs.

    Returns the first error of each failed shard by its number. Raises GpuLost and ConfigError at once.
    """
    needed = open_dataset(dataset_url).config.stages()
    chosen = [stage for stage in STAGES if stage in needed and (stages is None or stage in stages)]
    errors: dict[str, str] = {}
    for shard in shards:
        for stage in chosen:
            try:
                STAGE_TASKS[stage](dataset_url, shard)
            except (GpuLost, ConfigError):
                raise  # the next shard would end the same way
            except Exception as error:
                errors[str(shard)] = f"{stage}: {error if isinstance(error, ShardError) else describe(error)}"
                break
    return errors


def describe(error: Exception) -> str:
    """An error in one line, with its class: what a table of failures can hold."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
