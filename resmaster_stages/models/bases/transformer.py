"""What the loaded models of all transformer families share: the `Base` that each family's class completes.

A family's class says how text is encoded (by the pipeline's own `encode_prompt`) and how the transformer is called
(`predict`). The engine sees a denoiser like any other: latents [N, C, h, w] and a timestep in, eps - x0 (or eps) of the
same shape out. Views keep their own positions, counted from 0, because a transformer has been trained on these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resmaster_stages.models.bases.base import (
    Family,
    Geometry,
    ImageAdapter,
    Rows,
    Sampling,
    Texts,
    guide,
    require_unshifted,
)
from resmaster_stages.models.bases.transformer_files import (
    Facts,
    Kind,
    added,
    content,
    family_of_kind,
    longest,
    path_of,
)
from resmaster_stages.models.schedule import Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.models.schedule import Step


class Velocity:
    """A transformer that is called as the engine calls denoisers.

    It stands for the transformer wherever a torch module is expected: it can be moved, and its layers can be listed.
    """

    def __init__(self, network: Any, predict: Callable[[Tensor, Tensor, Rows], Tensor]) -> None:
        self.network = network
        self.dtype = compute_dtype(network)
        self._predict = predict

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool, **arguments: Any) -> tuple[Tensor, ...]:
        """Outputs [N, C, h, w] for latents [N, C, h, w] at one timestep []. `arguments` hold `rows`."""
        return (self._predict(sample, timestep, arguments["rows"]),)

    def to(self, *args: Any, **kwargs: Any) -> Velocity:
        """Moves the transformer."""
        self.network.to(*args, **kwargs)
        return self

    def parameters(self) -> Iterator[Any]:
        """The transformer's."""
        return self.network.parameters()

    @property
    def config(self) -> Any:
        """The transformer's."""
        return self.network.config


def compute_dtype(network: Any) -> torch.dtype:
    """The number format in which a transformer computes. Quantised weights are stored in another one."""
    import torch

    quantizer = getattr(network, "hf_quantizer", None)
    stated = getattr(quantizer, "compute_dtype", None) or getattr(
        getattr(quantizer, "quantization_config", None), "bnb_4bit_compute_dtype", None
    )
    if isinstance(stated, torch.dtype):
        return stated
    plain = (torch.float32, torch.bfloat16, torch.float16)
    return next((each.dtype for each in network.parameters() if each.dtype in plain), torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Transformer(ABC):
    """A loaded model. Each family has a class of its own, with `encode` and `predict`."""

    kind: Kind
    pipe: Any
    facts: Facts
    geometry: Geometry
    denoiser: Velocity

    @classmethod
    def of(cls, kind: Kind, pipe: Any, facts: Facts, geometry: Geometry) -> Transformer:
        """The parts of a pipeline."""
        made = cls(kind, pipe, facts, geometry, Velocity(pipe.transformer, lambda *call: made.predict(*call)))
        return made

    # ------------------------------------------------------------------------------------- of each family's own

    @abstractmethod
    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """Prompts or negative prompts as the transformer reads them, by the pipeline's own `encode_prompt`."""

    @abstractmethod
    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The output [N, C, h, w] for latents [N, C, h, w] in the transformer's number format, at one timestep []."""

    # ------------------------------------------------------------------------------------------------- shared

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder that reads the longest text."""
        return getattr(self.pipe, self.kind.tokenizer, None) or self.pipe.tokenizer

    @property
    def tokens(self) -> int:
        """What the family reads, or what the tokenizer is limited to."""
        return longest(self.kind, self.facts, self.tokenizer)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """The number of tokens of each prompt, with those that are added."""
        more = added(self.kind, self.tokenizer)
        return [len(ids) + more for ids in content(self.tokenizer, list(prompts))]

    @property
    def family(self) -> Family:
        """The family that the kind describes."""
        return family_of_kind(self.kind)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, unpacked."""
        return self.kind.in_channels(self.facts.transformer)

    @property
    def vae(self) -> Any:
        """The pipeline's."""
        return self.pipe.vae

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        """The pipeline's, without those that it does not have."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return tuple(part for name in names if (part := getattr(self.pipe, name, None)) is not None)

    @property
    def image_encoder(self) -> Any | None:
        """The pipeline's, or None."""
        return getattr(self.pipe, "image_encoder", None)

    @property
    def layers(self) -> None:
        """A transformer has no layers of a UNet."""
        return None

    @property
    def sampling(self) -> Sampling:
        """As the model's configurations say."""
        return self.kind.sampling(self.facts)

    def path(self, steps: int, timing: Timing) -> tuple[Step, ...]:
        """The path that the scheduler's configuration describes, or through the timesteps of `timing`."""
        if not self.kind.shifted:
            require_unshifted(timing, self.kind.name)
        return path_of(self.kind, self.facts, steps, timing)

    def guide(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        """Plain classifier-free guidance."""
        return guide(unconditional, conditional, scale)

    def arguments(self, rows: Rows) -> dict[str, Any]:
        """The rows, which `predict` takes apart."""
        return {"rows": rows}

    def to_canvas(self, latents: Tensor) -> Tensor:
        """(latents - shift) * scale, by the VAE's configuration."""
        config = self.vae.config
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def from_canvas(self, latents: Tensor) -> Tensor:
        """The inverse of `to_canvas`."""
        config = self.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0.0)

    def image_adapter(self) -> ImageAdapter | None:
        """None."""
        return None

    def image_scale(self, scale: float) -> AbstractContextManager[None]:
        """Nothing to do without an image adapter."""
        return nullcontext()

    @property
    def context_tokens(self) -> int:
        """The most tokens of a row beside those of its view."""
        return self.tokens

    def row_bytes(self, height: int, width: int) -> int:
        """The estimate of `row_bytes`."""
        tokens = height * width // self.geometry.multiple**2 + self.context_tokens
        return row_bytes(self.denoiser, tokens, self.kind.live)


def row_bytes(denoiser: Velocity, tokens: int, live: float) -> int:
    """Peak memory in bytes that one row of `tokens` tokens holds while `denoiser` computes it.

    live: values in memory at once, per value of the tokens (`Kind.live`). The peak is the same in every block, so the
    number of blocks does not matter.
    """
    config = denoiser.config
    width = config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
    return int(live * tokens * width * denoiser.dtype.itemsize)


def packed(latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] as tokens [N, h / 2 * w / 2, C * 4], each of a square of 2 x 2 latents, in the order
    channel, row, column. Sides are even."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, height * width // 4, channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`: [N, C, h, w]."""
    count, _, values = tokens.shape
    squares = tokens.view(count, height // 2, width // 2, values // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(count, values // 4, height, width)
