"""The part `reference` of a configuration: how the low-res image becomes latents of the target's size. Several methods
have it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from resmaster_stages.config.part import Later, Part

GREATEST_NOISE = 4.0
"""Greatest standard deviation of noise at edges, in latents. Above about 1.2, specks appear."""


class ReferenceConfig(Part):
    """How the low-res image becomes latents of the target's size. Captions and image prompts always read the bicubic
    enlargement in pixels."""

    places: ClassVar[tuple[str, ...]] = ("model", "weight_name", "revision")

    enlarge: Literal["own", "image", "latent", "network"] = Later("own")
    """`image`: the pixels are enlarged bicubically and encoded. `latent`: the latents are enlarged bicubically.
    `network`: the latents are enlarged by a network that was trained for the model's VAE (LSRNA). `own`: as the
    method's authors do (DemoFusion `latent`, ScaleDiff a mixture of both, all others `image`)."""
    model: str | None = Later(None)
    """With `enlarge: network`, the network: a file of weights such as model.safetensors, which `train_latent_enlarger`
    wrote for the model's VAE, or a hub id together with `weight_name`."""
    weight_name: str | None = Later(None)
    """File of the weights on the hub."""
    revision: str | None = Later(None)
    """Commit or tag on the hub."""
    edge_noise: tuple[float, float] = Later((0.0, 0.0))
    """Standard deviation of noise that is added to the enlarged latents before a pass begins from them: [where the
    low-res image is smooth, where its edges are dense]. More noise gives more new detail. LSRNA: [0, 1.2]."""

    @model_validator(mode="after")
    def _check_noise(self) -> ReferenceConfig:
        low, high = self.edge_noise
        if not 0 <= low <= high <= GREATEST_NOISE:
            raise ValueError(
                f"edge_noise [{low:g}, {high:g}]: give two numbers from 0 to {GREATEST_NOISE:g}, the smaller one first"
            )
        return self

    @model_validator(mode="after")
    def _check_network(self) -> ReferenceConfig:
        for name in ("model", "weight_name", "revision"):
            if self.enlarge != "network" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set, but is read only with enlarge: network; set that too, or drop {name}")
        if self.enlarge == "network" and self.model is None:
            raise ValueError(
                "enlarge: network needs a network; set model to a file that was trained for the model's VAE "
                "(docs/methods.md, Latent enlargement), or set enlarge: image"
            )
        file = self.weight_name or self.model
        if file is not None and not file.endswith(".safetensors"):
            raise ValueError(f"{file} is not a .safetensors file; choose one that is")
        return self

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added to the enlarged latents."""
        return self.edge_noise[1] > 0
