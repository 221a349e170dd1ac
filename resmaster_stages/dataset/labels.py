"""What the images of a dataset say of themselves: by which model and with which settings they were made.

Invariant: a label follows from the sample, the configuration and the weights, as the image itself does.
"""

from __future__ import annotations

from dataclasses import dataclass

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Sample
from resmaster_stages.storage.labels import Label, parameters

GENERATED = "trainedAlgorithmicMedia"
"""IPTC's term for what a trained model made."""
ALTERED = "compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for media, here the user's image, that a trained model has changed or completed."""
ENHANCED = "algorithmicallyEnhanced"
"""IPTC's term for media that an algorithm without a trained model has changed a little, here enlarged."""


@dataclass(frozen=True)
class Drawing:
    """How a base model drew an image."""

    sampler: str
    """Its name in other programs (`models.samplers`)."""
    steps: int
    guidance_scale: float
    seed: int
    negative_prompt: str


def source_type_of(config: DatasetConfig, by_model: bool) -> str:
    """IPTC's term for an image that a stage made. by_model: whether a trained model made it."""
    return GENERATED if not config.images else ALTERED if by_model else ENHANCED


def high_res_source_type(config: DatasetConfig) -> str:
    """IPTC's term for the high-res images of a dataset."""
    return source_type_of(config, by_model=config.upscale.base_model or bool(config.upscale.networks()))


def label_of(
    config: DatasetConfig, sample: Sample, weights: str, drawing: Drawing | None, scale: float | None = None
) -> Label | None:
    """The label of an image that a stage made. None if the images of the dataset carry none.

    weights: identity of the model that made the image; "" if none did. drawing: None if no base model drew it. scale:
    that of a high-res image.
    """
    if config.image_metadata == "none":
        return None
    model, kind = weights.partition("@")[0], source_type_of(config, bool(weights))
    if config.image_metadata == "source":
        return Label(kind, model)
    if drawing is None:
        return Label(kind, model, sample.prompt)
    settings: dict[str, object] = {
        "Steps": drawing.steps,
        "Sampler": drawing.sampler,
        "CFG scale": f"{drawing.guidance_scale:g}",
        "Seed": drawing.seed,
        "Size": f"{sample.width}x{sample.height}",
        "Model": model,
    }
    if scale is not None:  # so A1111 writes what it enlarges itself: the small size, and how often
        settings |= {"Hires upscale": f"{scale:g}", "Hires upscaler": config.upscale.method}
    text = parameters(sample.prompt, drawing.negative_prompt, settings)
    return Label(kind, model, sample.prompt, text)
