"""CLIP score: does the image show what the prompt says? (Hessel et al. 2021, scaled by 100 as torchmetrics does.)

The whole image is resized to CLIP's input without cropping, so that nothing at its borders is overlooked. The score
says nothing about fine detail, because 224 px cannot show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from resmaster_stages.errors import ConfigError
from resmaster_stages.metrics.metric import Column, Metric, Pair
from resmaster_stages.metrics.resize import resize
from resmaster_stages.models.files import TRANSFORMERS, folder_with, object_in, require_tokenizer, require_weights
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.models.places import location, reason_of, resolve_device, whole_weights
from resmaster_stages.models.quiet import quiet


class ClipScorer:
    """A CLIP model and its tokenizer, in float32. Results are deterministic on one device."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]):
        self.model, self.tokenizer = model, tokenizer
        self._mean, self._std = np.asarray(mean), np.asarray(std)
        self.input_px: int = model.config.vision_config.image_size

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """100 * max(cos(image, text), 0) of each pair, in one batch. Texts are cut at the model's length."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        if len(images) != len(texts):
            raise ValueError(f"as many images as texts expected, got {len(images)} and {len(texts)}")
        if not images:
            return []
        device = self.model.device
        tokens = self._tokens(texts)
        pixels = np.stack([self._pixels(image) for image in images])  # [B, 3, px, px]
        with busy(), torch.inference_mode(), device_faults("set quality.device: cpu"):
            output = self.model(
                **tokens,
                pixel_values=torch.from_numpy(pixels).to(device, self.model.dtype),
            )
            cosine = torch.nn.functional.cosine_similarity(
                output.image_embeds.float(), output.text_embeds.float(), dim=-1
            ).cpu()
        return [100.0 * max(float(value), 0.0) for value in cosine]

    def image_embeddings(self, images: Sequence[Image.Image]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Projected image embeddings [N, D], not normalised."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        pixels = torch.from_numpy(np.stack([self._pixels(image) for image in images]))
        with busy(), torch.inference_mode(), device_faults("set quality.device: cpu"):
            seen = self.model.vision_model(pixel_values=pixels.to(self.model.device, self.model.dtype))
            return self.model.visual_projection(seen.pooler_output).float().cpu().numpy()

    def text_embeddings(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Projected text embeddings [N, D] of unit length."""
        import torch

        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.faults import device_faults

        tokens = self._tokens(texts)
        with busy(), torch.inference_mode(), device_faults("set quality.device: cpu"):
            read = self.model.text_model(**tokens)
            embeds = torch.nn.functional.normalize(self.model.text_projection(read.pooler_output).float(), dim=-1)
        return embeds.cpu().numpy()

    def _tokens(self, texts: Sequence[str]) -> dict[str, Any]:
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _pixels(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        values = resize(image, self.input_px, self.input_px) / 255.0
        return ((values - self._mean) / self._std).transpose(2, 0, 1).astype(np.float32)


OTHER_CLIPS = "give `picturebook`, a folder or hub id of a CLIP model with safetensors weights, or null"
"""What to do about a CLIP model that cannot be used."""


def check_clip(identifier: str, revision: str | None = None) -> None:
    """Raise ConfigError if the CLIP model `picturebook`, a folder or a hub id cannot be used, as far as its files say.

    Loads nothing. Raises NotOnThisMachine for a model that is at the hub only.
    """
    folder = folder_with(identifier, "config.json", revision, "clip")
    kind = object_in(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ConfigError(f"{identifier} is {kind!r}, no CLIP model; {OTHER_CLIPS}")
    require_weights(identifier, folder, TRANSFORMERS)
    require_tokenizer(identifier, folder)


@lru_cache(maxsize=2)
def load_clip(identifier: str, revision: str | None = None, device: str = "auto") -> ClipScorer:
    """The scorer of `picturebook`, a folder or a hub id. Raises ConfigError, in one line, if it cannot be loaded.

    Two scorers stay loaded, because the check of captions may use another model than the CLIP score.
    """
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    resolved, place = resolve_device(device, "quality.device"), location(identifier, "clip")
    options: dict[str, Any] = {"local_files_only": identifier == PICTUREBOOK}
    if revision:
        options["revision"] = revision
    try:
        with quiet(), whole_weights(place):
            model = CLIPModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32, **options)
        tokenizer = CLIPTokenizer.from_pretrained(place, **options)
        processor = CLIPImageProcessorPil.from_pretrained(place, **options)
        model.to(resolved).eval()
    except Exception as error:  # loaders raise many kinds of errors; the user's remedy is the same
        raise ConfigError(
            f"CLIP model {identifier!r} cannot be loaded ({reason_of(error, place)}); give quality.clip, or "
            "captions.check.clip if that names it, `picturebook`, a folder or hub id of a CLIP model with "
            "safetensors weights, or null"
        ) from None
    return ClipScorer(model, tokenizer, processor.image_mean, processor.image_std)


def clip_score(pair: Pair) -> float | None:
    """The CLIP score of a high-res image and its prompt; None without a model or a prompt."""
    return pair.clip.scores([pair.high], [pair.prompt])[0] if pair.clip and pair.prompt else None


METRIC = Metric(
    compute=lambda pair: (clip_score(pair),),
    columns=(
        Column(
            "clip_score",
            "100 times the cosine of image and prompt",
            label="CLIP",
            form="{:.1f}",
            better="↑",
            compared=True,
            badness=(100.0, 0.0),
        ),
    ),
)
