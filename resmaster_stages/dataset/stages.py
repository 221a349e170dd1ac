"""Which stages a stage depends on, and what identifies its result. Touches no storage; reads the names of weights
only."""

from __future__ import annotations

from typing import Any

from resmaster_stages.config.dataset import DatasetConfig, Stage
from resmaster_stages.keys import digest
from resmaster_stages.metrics import metric_columns
from resmaster_stages.models.identity import Weights


def upstream_of(config: DatasetConfig, stage: Stage) -> tuple[Stage, ...]:
    """The stages whose output `stage` reads."""
    if stage == "low_res":
        return ()
    if stage == "captions":
        return ("low_res",)
    if stage == "high_res":
        return ("low_res", "captions") if config.upscale.uses("captions") else ("low_res",)
    return ("low_res", "high_res")


def stage_hashes(config: DatasetConfig) -> dict[Stage, str]:
    """The identity of every stage that the dataset needs."""
    from resmaster_stages.models.identity import weights_of

    weights = weights_of(config)
    return {stage: stage_hash(config, stage, weights) for stage in config.stages()}


STAGE_VERSIONS: dict[str, int] = {"low_res": 1, "captions": 1, "high_res": 1, "quality": 2}
"""Raised by hand whenever a stage's code changes its result: old commits then no longer count as done."""


def stage_hash(config: DatasetConfig, stage: Stage, weights: Weights) -> str:
    """Identity (64 hex digits) of what `stage` computes: its part of the configuration, its weights, its version, and
    all that is upstream of it."""
    model = {**config.model.identity(), "weights": weights.model}
    own: dict[str, Any]
    upstream: list[Stage]
    if stage == "low_res":
        own = {"plan": config.plan_identity(), "image_format": config.image_format}
        if not config.images:
            own |= {"low_res": config.low_res.identity(), "model": model}
        upstream = []
    elif stage == "captions":
        own = {
            "captions": config.captions.identity(),
            "views": {"scale": config.upscale.way()[0].scale, "stride": config.upscale.view_stride},
            "weights": weights.captioner,
            "tokenizer": weights.model,
        }
        if judge := config.caption_clip():  # unchecked captions are what they were before there was a check
            own["check"] = {"clip": judge, "weights": weights.caption_check, "margin": config.captions.check.margin}
        upstream = ["low_res"]
    elif stage == "high_res":
        network = {"model": model} if config.upscale.base_model else {"weights": weights.upscaler}
        own = {
            "upscale": config.upscale.identity(),
            **network,
            "image_format": config.image_format,
            "webp_quality": config.webp_quality,
        }
        upstream = ["low_res", "captions"] if config.upscale.uses("captions") else ["low_res"]
    else:
        measured = [column.name for column in metric_columns()]
        own = {"quality": config.quality.identity(), "weights": weights.clip, "columns": measured}
        if weights.features:
            own["features"] = weights.features
        upstream = ["high_res"]
    return digest(
        {
            "stage": stage,
            "version": STAGE_VERSIONS[stage],
            "config": own,
            "upstream": {name: stage_hash(config, name, weights) for name in upstream},
        }
    )
