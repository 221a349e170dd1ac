"""The loaded parts of a base model, as the engine uses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases import family_of_pipeline
from resmaster_stages.models.bases.base import Base, Geometry, Offload
from resmaster_stages.models.occupancy import occupy


@dataclass(frozen=True, eq=False)
class Models:
    """A loaded base model and the device that it runs on."""

    base: Base
    device: torch.device
    dtype: torch.dtype
    offload: Offload = "none"
    gives_way: bool = False
    """Whether these parts and the captioner take turns on the device. A user's own pipeline stays where it is."""
    identity: str = "pipeline"
    same_bytes: bool = True
    """Whether convolution kernels are chosen by rule, so that a re-run gives the same bytes. Otherwise a benchmark
    chooses the fastest ones."""

    @property
    def geometry(self) -> Geometry:
        """The base model's sizes."""
        return self.base.geometry

    def guided(self, guidance_scale: float) -> bool:
        """Whether guidance of this scale takes an unconditional branch."""
        return guidance_scale != 1 and self.base.sampling.kind == "cfg"

    def branches(self, guidance_scale: float) -> int:
        """The most guidance branches of a view."""
        return 2 if self.guided(guidance_scale) else 1

    @property
    def control_net(self) -> Any | None:
        """The ControlNet that is loaded with the model. None if there is none; only UNets can have one."""
        return getattr(self.base, "control_net", None)

    @property
    def parts(self) -> tuple[Any, ...]:
        """All modules of the model."""
        base = self.base
        parts = (base.denoiser, base.vae, *base.text_encoders, base.image_encoder, self.control_net)
        return tuple(part for part in parts if part is not None)

    @property
    def resident(self) -> tuple[Any, ...]:
        """The modules that stay on the device."""
        return tuple(part for part in self.parts if not self._visits(part))

    def _visits(self, module: Any) -> bool:
        """Whether a module is on the device only while it works."""
        if self.offload == "text":
            return any(module is encoder for encoder in self.base.text_encoders)
        return self.offload == "model"

    def come(self) -> None:
        """Moves the captioner off the device and the parts that stay on the device to it.

        Does nothing for a user's own pipeline. Errors of moving are raised.
        """
        if self.gives_way:
            occupy(self.device, *self.resident)

    @contextmanager
    def using(self, *modules: Any) -> Iterator[None]:
        """Within the block, `modules` are on the device. Those that are offloaded go back to the CPU afterwards."""
        self.come()
        visitors = [module for module in modules if self._visits(module)]
        try:
            for module in visitors:
                module.to(self.device)
            yield
        finally:
            for module in visitors:
                module.to("cpu")

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        *,
        identity: str = "pipeline",
        offload: Offload = "none",
        config: ModelConfig | None = None,
    ) -> Models:
        """The parts of a pipeline of a known family, e.g. a StableDiffusionXLPipeline.

        The pipeline's own checkpoint, LoRA, scheduler and IP-Adapter are used as they are. The pipeline must be on the
        device that it shall run on. config: its `native_px` and `guidance` are what the user says of the model.

        Raises ConfigError for a pipeline of an unknown family.
        """
        family = family_of_pipeline(pipe, identity)
        try:
            base = family.base(pipe, config or ModelConfig())
        except ConfigError as error:
            raise ConfigError(f"model {identity}: {error}") from None
        return cls(
            base=base,
            # Pipelines whose parts are moved on demand report the CPU as their `device`.
            device=torch.device(getattr(pipe, "_execution_device", pipe.device)),
            dtype=base.denoiser.dtype,
            offload=offload,
            identity=identity,
        )
