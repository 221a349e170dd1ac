"""Which stages a stage depends on, and what identifies its result. Touches no storage; reads the names of weights only."""

from __future__ import annotations

from resmaster_stages.config import DatasetConfig, Stage, stage_hash


def upstream_of(config: DatasetConfig, stage: Stage) -> tuple[Stage, ...]:
    """The stages whose output `stage` reads."""
    if stage == "low_res":
        return ()
    if stage == "captions":
        return ("low_res",)
    if stage == "high_res":
        return ("low_res", "captions") if config.upscale.uses_captions() else ("low_res",)
    return ("low_res", "high_res")


def stage_hashes(config: DatasetConfig) -> dict[Stage, str]:
    """The identity of every stage that the dataset needs."""
    from resmaster_stages.models.identity import weights_of

    weights = weights_of(config)
    return {stage: stage_hash(config, stage, weights) for stage in config.stages()}
