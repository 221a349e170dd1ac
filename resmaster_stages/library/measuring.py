"""The metrics of single images, for scripts and notebooks."""

from __future__ import annotations

from typing import Any

from resmaster_stages.config.dataset import QualityConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.library.images import AnyImage, open_image
from resmaster_stages.models.identity import PICTUREBOOK


def measure(
    low_res: AnyImage, high_res: AnyImage, prompt: str = "", *, model: str = PICTUREBOOK, clip: str | None = None
) -> dict[str, Any]:
    """Measure an image and its enlargement. Returns the metrics by name, and the flags at the default thresholds.

    low_res, high_res: as `image` of `upscale`. model: hub id or folder of the model that enlarged; its native size says
    where view borders are measured. clip: a CLIP model for the CLIP score of `prompt`; None leaves the score out.
    docs/evaluation-protocol.md explains the metrics. Raises UserError.
    """
    from resmaster_stages.diffusion.views import view_grid
    from resmaster_stages.metrics.flags import flags
    from resmaster_stages.metrics.metric import Pair
    from resmaster_stages.models.geometry import geometry_of
    from resmaster_stages.quality import measure as row_of

    low, high = open_image(low_res), open_image(high_res)
    config = ModelConfig(id=model)
    scorer = None
    if clip is not None:
        from resmaster_stages.metrics.clip_score import load_clip

        scorer = load_clip(clip)
    grid = view_grid(geometry_of(config), high.height, high.width, 0.5)
    row = row_of(Pair(low, high, grid.pixel_boxes, prompt, scorer))
    return {**row, "flags": flags(row, QualityConfig())}
