"""SDXL, and Stable Diffusion 1.x and 2.x: diffusers' UNet2DConditionModel with CLIP text encoders and a KL autoencoder.

SDXL has two text encoders and reads pooled text and numbers of size and crop. Stable Diffusion has one text encoder and
reads neither. Both follow a variance-preserving path (`models.schedule`) and take IP-Adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import ControlNetConfig, IpAdapterConfig, ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import adapter_files, control_files, few_step, few_step_files, unet_files
from resmaster_stages.models.bases.base import (
    Family,
    Geometry,
    Layers,
    Rows,
    Sampling,
    Texts,
    TokenCounter,
    guide,
    require_unshifted,
    sized,
)
from resmaster_stages.models.places import ModelFiles, loading, location, vae_dtype
from resmaster_stages.models.schedule import Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.models.ip_adapter import IpAdapter
    from resmaster_stages.models.schedule import Step

SDXL_NATIVE_PX = 1024
_FEED_FORWARD = 21
"""Values that are live at once, per value of the feed-forward's input: both halves of its gate (8), the gate (4),
their product (4) and the layers around."""


# ------------------------------------------------------------------------------------------- before it is loaded


def geometry(config: ModelConfig) -> Geometry:
    """The sizes from the UNet's `sample_size` (in latents) and the VAE's down-samplings (a factor of 2 each), if
    `model.native_px` says nothing else.

    Raises ConfigError.
    """
    files = ModelFiles(config.id, config.revision)
    size = files.json("unet/config.json").get("sample_size")
    channels = files.json("vae/config.json").get("block_out_channels")
    if not isinstance(size, int):
        raise ConfigError(f"model {files.id!r}: unet/config.json has no whole number `sample_size`; use another model")
    if not isinstance(channels, list) or not channels:
        raise ConfigError(f"model {files.id!r}: vae/config.json has no list `block_out_channels`; use another model")
    return _geometry(size, channels, config)


def _geometry(sample_size: int, vae_channels: Sequence[int], config: ModelConfig) -> Geometry:
    factor = 2 ** (len(vae_channels) - 1)
    return Geometry(sized(config, sample_size * factor, factor), factor)


def token_counter(config: ModelConfig) -> TokenCounter:
    """Counts with the model's first tokenizer."""
    from transformers import CLIPTokenizer

    with loading(config.id, "its tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(
            location(config.id), subfolder="tokenizer", revision=config.revision or "main"
        )
    return lambda text: len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


# ----------------------------------------------------------------------------------------------------- loading


def load(pipeline: str, more: Mapping[str, Any], config: ModelConfig, dtype: torch.dtype) -> Any:
    """Loads the model with diffusers' class `pipeline`. `more` are further arguments of its loader.

    Raises ConfigError.
    """
    import diffusers

    kinds: dict[str, Any] = {"default": dtype, "vae": vae_dtype(dtype)}
    extra = dict(more)
    if config.vae:
        with loading(config.vae, "the VAE"):
            extra["vae"] = diffusers.AutoencoderKL.from_pretrained(
                location(config.vae), dtype=kinds["vae"], use_safetensors=True
            )
    if config.few_step is not None and (unet := few_step_files.load_unet(config, dtype)) is not None:
        extra["unet"] = unet
    with loading(config.id, "it"):
        pipe = getattr(diffusers, pipeline).from_pretrained(
            location(config.id),
            revision=config.revision,
            variant=config.variant,
            dtype=kinds,
            use_safetensors=True,
            **extra,
        )
    if config.few_step is not None and "unet" not in extra:
        few_step_files.fuse_lora(pipe.unet, config)
    if (adapter := unet_files.configured_adapter(config)) is not None:
        _load_adapter(pipe, adapter, dtype)
    if config.controlnet is not None:
        pipe.controlnet = _load_control(config.controlnet, dtype)
    return pipe


def _load_adapter(pipe: Any, adapter: IpAdapterConfig, dtype: torch.dtype) -> None:
    """Loads the image encoder and the IP-Adapter's weights into `pipe`."""
    adapter_files.require_safetensors(adapter)
    if pipe.image_encoder is None:
        encoder = adapter_files.load_encoder("CLIPVisionModelWithProjection", adapter, dtype)
        pipe.register_modules(image_encoder=encoder)
    with loading(adapter.id, "the IP-Adapter"):
        adapter_files.load_weights(pipe, adapter)


def _load_control(net: ControlNetConfig, dtype: torch.dtype) -> Any:
    """The ControlNet on the CPU."""
    import diffusers

    try:
        kind = control_files.kind_of(control_files.configuration(net))
    except ConfigError as error:
        raise ConfigError(f"model.controlnet: {error}") from None
    with loading(net.id, "the ControlNet"):
        return getattr(diffusers, kind).from_pretrained(
            location(net.id),
            subfolder=net.folder or None,
            revision=net.revision,
            variant=net.variant,
            dtype=dtype,
            use_safetensors=True,
        )


# ------------------------------------------------------------------------------------------------------ loaded


@dataclass(frozen=True, eq=False)
class Unet:
    """A loaded model of either family."""

    family: Family
    denoiser: Any
    geometry: Geometry
    latent_channels: int
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    image_encoder: Any | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    scheduler_config: Mapping[str, Any]
    told_sizes: bool
    """Whether the UNet reads pooled text and numbers of size and crop (SDXL)."""
    zeros_for_empty_prompt: bool
    """Whether the empty negative prompt is all zeros, as the model was trained (`force_zeros_for_empty_prompt`)."""
    few_step: few_step.FewStep | None
    """The few-step weights that the denoiser has. None: its own."""
    control_net: Any | None
    """The ControlNet that `diffusion.control` adds to the UNet, if one is loaded."""

    @property
    def network(self) -> Any:
        """The UNet2DConditionModel."""
        return self.denoiser

    @property
    def layers(self) -> Layers:
        """Found by the UNet's depth and the width of its text. A UNet without four levels counts as SDXL's."""
        config = self.network.config
        if len(config.block_out_channels) != 4:
            return "sdxl"
        return "sd2" if config.cross_attention_dim == 1024 else "sd1"

    @property
    def tokens(self) -> int:
        """The number of tokens of the shorter text encoder."""
        return min(tokenizer.model_max_length for tokenizer in self.tokenizers)

    @property
    def sampling(self) -> Sampling:
        """Any steps, and guidance of any scale; with few-step weights, what they were distilled to."""
        return Sampling() if self.few_step is None else self.few_step.sampling

    def path(self, steps: int, timing: Timing) -> tuple[Step, ...]:
        """The path that the scheduler's configuration describes, or through the timesteps of `timing`, or else through
        those of few-step weights."""
        from resmaster_stages.models.schedule import make_schedule

        require_unshifted(timing, self.family.name)
        visited = timing.timesteps or (() if self.few_step is None else self.few_step.timesteps(steps))
        return make_schedule(self.scheduler_config, steps, visited)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The greatest count of all tokenizers."""
        counts = [[len(ids) for ids in tokenizer(list(prompts)).input_ids] for tokenizer in self.tokenizers]
        return [max(each) for each in zip(*counts)]

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Plain classifier-free guidance."""
        return guide(unconditional, conditional, scale)

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """The same as `encode_prompt` of diffusers' pipelines.

        SDXL: the penultimate states of both encoders side by side, and the pooled output of the second encoder. Stable
        Diffusion: the last states of the only encoder.
        """
        states, pooled = self._encode(prompts, device)
        if negative and self.zeros_for_empty_prompt:
            for place in (number for number, prompt in enumerate(prompts) if not prompt):
                states[place] = 0
                pooled[place] = 0
        return Texts(states, pooled)

    def _encode(self, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        import torch

        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = encoder(tokens.input_ids.to(device), output_hidden_states=True)
            if not self.told_sizes:
                return output.last_hidden_state, output.last_hidden_state.new_zeros(len(prompts), 0)
            states.append(output.hidden_states[-2])
        return torch.cat(states, dim=-1), output[0]

    def arguments(self, rows: Rows) -> dict[str, Any]:
        """Text, image prompts and, for SDXL, pooled text and numbers of size and crop."""
        added: dict[str, Any] = {"image_embeds": [] if rows.image is None else [rows.image]}
        if self.told_sizes:
            added |= {"text_embeds": rows.pooled, "time_ids": rows.sizes}
        return {"encoder_hidden_states": rows.states, "added_cond_kwargs": added}

    def to_canvas(self, latents: Tensor) -> Tensor:
        """Scales the latents, or scales and shifts them per channel if the VAE's configuration has `latents_mean` and
        `latents_std`."""
        scale, shift = self._affine(latents)
        return (latents - shift) * scale

    def from_canvas(self, latents: Tensor) -> Tensor:
        """The inverse of `to_canvas`."""
        scale, shift = self._affine(latents)
        return latents / scale + shift

    def _affine(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(scale, shift), where denoiser's latents = scale * (VAE's latents - shift)."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return config.scaling_factor, 0.0
        shift, spread = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return config.scaling_factor / spread, shift

    def image_adapter(self) -> IpAdapter | None:
        """The IP-Adapter, if one is loaded with its image encoder. Raises ConfigError for an unsupported kind."""
        from resmaster_stages.models.ip_adapter import adapter_of

        if self.image_encoder is None:
            return None
        return adapter_of(self.network, self.image_encoder, self.image_mean, self.image_std)

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Sets the weight of the UNet's IP-Adapters, if there are any."""
        from resmaster_stages.models.ip_adapter import adapter_scale

        return adapter_scale(self.network, scale)

    def row_bytes(self, height: int, width: int) -> int | None:
        """The estimate of `row_bytes`, and with a ControlNet its features, which wait while the UNet computes."""
        features = 0 if self.control_net is None else feature_bytes(self.network, height, width)
        return row_bytes(self.network, height, width) + features


def feature_bytes(unet: Any, height: int, width: int) -> int:
    """Memory in bytes of the feature maps of one row of `height` x `width` latents for the skip connections of the up
    blocks of `unet`, and of its middle block."""
    deepest = unet.config.block_out_channels[-1] * _area(height, width, len(unet.config.block_out_channels) - 1)
    return int((_waiting(unet, height, width) + deepest) * unet.dtype.itemsize)


def _area(height: int, width: int, level: int) -> int:
    """Cells of a level of a UNet."""
    return -(-height // 2**level) * -(-width // 2**level)


def _waiting(unet: Any, height: int, width: int) -> int:
    """Values of the feature maps of one row that wait for the up blocks."""
    channels, per_block = unet.config.block_out_channels, unet.config.layers_per_block
    waiting = channels[0] * height * width  # of conv_in
    for level in range(len(channels)):
        layers = per_block if isinstance(per_block, int) else per_block[level]
        waiting += layers * channels[level] * _area(height, width, level)
        if level + 1 < len(channels):
            waiting += channels[level] * _area(height, width, level + 1)
    return int(waiting)


def row_bytes(unet: Any, height: int, width: int) -> int:
    """Peak memory in bytes that one row of `height` x `width` latents holds while `unet` computes it.

    The peak is in the last feed-forward of the finest attention. There a row holds the feature maps for the skip
    connections of the up blocks, and about 21 times the values of that level's tokens. A test checks that the estimate
    is within 10 % of what is allocated step by step, for the shapes of SDXL, Stable Diffusion 1.5 and picturebook.
    """
    attending = [
        unet.config.block_out_channels[level] * _area(height, width, level)
        for level, kind in enumerate(unet.config.down_block_types)
        if "CrossAttn" in kind
    ]
    live = _waiting(unet, height, width) + _FEED_FORWARD * max(attending, default=0)
    return int(live * unet.dtype.itemsize)


def base(told_sizes: bool, pipe: Any, config: ModelConfig) -> Unet:
    """The parts of a StableDiffusionXLPipeline (`told_sizes`) or StableDiffusionPipeline.

    The pipeline's own checkpoint, LoRA, scheduler and IP-Adapter are used as they are. Raises ConfigError for variants
    that this engine cannot use.
    """
    unet, encoder, second = pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)
    encoders = sum(each is not None for each in (encoder, second))
    unet_files.require_plain(told_sizes, unet.config, pipe.vae.config.latent_channels, encoders)
    processor = getattr(pipe, "feature_extractor", None)
    return Unet(
        family=SDXL if told_sizes else STABLE_DIFFUSION,
        denoiser=unet,
        geometry=_geometry(unet.config.sample_size, pipe.vae.config.block_out_channels, config),
        latent_channels=unet.config.in_channels,
        vae=pipe.vae,
        text_encoders=(encoder, second) if told_sizes else (encoder,),
        tokenizers=(pipe.tokenizer, pipe.tokenizer_2) if told_sizes else (pipe.tokenizer,),
        image_encoder=getattr(pipe, "image_encoder", None),
        image_mean=tuple(getattr(processor, "image_mean", None) or adapter_files.CLIP_MEAN),
        image_std=tuple(getattr(processor, "image_std", None) or adapter_files.CLIP_STD),
        scheduler_config={"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        told_sizes=told_sizes,
        zeros_for_empty_prompt=bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False)),
        few_step=few_step.few_step_of(config.few_step) if config.few_step else None,
        control_net=getattr(pipe, "controlnet", None),
    )


SDXL = Family(
    name="SDXL",
    pipelines="StableDiffusionXL.*",
    abilities=frozenset({"convolutions", "attention", "image_prompts", "few_step_weights", "control"}),
    geometry=geometry,
    token_counter=token_counter,
    load=partial(load, "StableDiffusionXLPipeline", {"add_watermarker": False}),
    base=partial(base, True),
    checks=partial(unet_files.checks, True),
    sampling=few_step.sampling,
)

STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipelines="StableDiffusion(ControlNet|PAG|Img2Img|Inpaint)*Pipeline",
    abilities=SDXL.abilities,
    geometry=geometry,
    token_counter=token_counter,
    load=partial(load, "StableDiffusionPipeline", {"safety_checker": None, "requires_safety_checker": False}),
    base=partial(base, False),
    checks=partial(unet_files.checks, False),
    sampling=few_step.sampling,
)


def like_sdxl(family: Family, geometry: Geometry) -> bool:
    """Whether a model is SDXL or a descendant of the same size, for which papers chose their numbers."""
    return family.name == SDXL.name and geometry.native_px == SDXL_NATIVE_PX
