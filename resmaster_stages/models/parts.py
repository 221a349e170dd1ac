"""A base model's loaded parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection

from resmaster_stages.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of RGB in [0, 1] that CLIP image encoders subtract where nothing else is configured."""


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation that goes with it."""


@dataclass(frozen=True, eq=False)
class Models:
    """The parts of a latent diffusion model with a UNet, as the engine uses them.

    SDXL has two text encoders, pooled text and size conditions; Stable Diffusion 1.x and 2.x have one encoder and
    neither.
    """

    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    image_encoder: Any | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    scheduler_config: Mapping[str, Any]
    zeros_for_empty_prompt: bool
    device: torch.device
    dtype: torch.dtype
    offload: bool = False
    identity: str = "pipeline"
    same_bytes: bool = True
    """Whether convolutions are chosen by rule, so that a re-run gives the same bytes; else by a race, which is
    faster."""

    @property
    def latent_factor(self) -> int:
        """Pixels per latent along one axis (8 for SDXL)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent (4 for SDXL)."""
        return int(self.unet.config.in_channels)

    @property
    def native_px(self) -> int:
        """Edge in px of the square images that the model was trained on (1024 for SDXL)."""
        return int(self.unet.config.sample_size) * self.latent_factor

    @property
    def told_sizes(self) -> bool:
        """Whether the UNet reads pooled text, and numbers of size and crop (SDXL)."""
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def has_ip_adapter(self) -> bool:
        """Whether image prompts can be used."""
        return self.image_encoder is not None and isinstance(self.unet.encoder_hid_proj, MultiIPAdapterImageProjection)

    @contextmanager
    def using(self, *modules: Any) -> Iterator[None]:
        """Within the block `modules` are on the device. With offloading they go back to the CPU afterwards."""
        if not self.offload:
            yield
            return
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            for module in modules:
                module.to("cpu")

    @classmethod
    def from_pipeline(cls, pipe: Any, *, identity: str = "pipeline", offload: bool = False) -> Models:
        """The parts of a StableDiffusionXLPipeline or StableDiffusionPipeline: its own checkpoint, LoRA, scheduler and
        IP-Adapter, as they are.

        The pipeline must be on the device that it shall run on. Raises ConfigError for any other kind.
        """
        unet, encoder = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
        second = getattr(pipe, "text_encoder_2", None)
        if unet is None or unet.config.addition_embed_type != ("text_time" if second else None):
            raise ConfigError(
                f"model {identity}: {type(pipe).__name__} is neither SDXL nor Stable Diffusion; give a base model of "
                "theirs"
            )
        if encoder is None:
            raise ConfigError(
                f"model {identity}: looks like an SDXL refiner (one text encoder); give an SDXL base model"
            )
        if unet.config.in_channels != pipe.vae.config.latent_channels or unet.config.time_cond_proj_dim is not None:
            raise ConfigError(f"model {identity}: an inpainting, editing or LCM variant; give a plain base model")
        processor = getattr(pipe, "feature_extractor", None)
        return cls(
            unet=unet,
            vae=pipe.vae,
            text_encoders=(encoder, second) if second else (encoder,),
            tokenizers=(pipe.tokenizer, pipe.tokenizer_2) if second else (pipe.tokenizer,),
            image_encoder=getattr(pipe, "image_encoder", None),
            image_mean=tuple(getattr(processor, "image_mean", None) or CLIP_MEAN),
            image_std=tuple(getattr(processor, "image_std", None) or CLIP_STD),
            scheduler_config={"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
            zeros_for_empty_prompt=bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)),
            device=torch.device(pipe._execution_device),
            dtype=unet.dtype,
            offload=offload,
            identity=identity,
        )
