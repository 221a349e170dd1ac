"""A network that predicts noise, called as one that predicts the velocity of a flow path (`models.bases.as_flow`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VelocityOfNoise(nn.Module):
    """Predicts eps - x0 with a UNet that predicts eps."""

    levels: Tensor

    def __init__(self, network: Any, levels: Tensor) -> None:
        """levels: the noise level on the flow path of each of the UNet's timesteps, rising: [timesteps]."""
        super().__init__()
        self.network = network
        self.register_buffer("levels", levels, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the UNet."""
        return self.network.dtype

    def timestep(self, level: Tensor) -> Tensor:
        """The UNet's timestep with a noise level []: a whole number if a timestep has this level, up to rounding."""
        place = torch.searchsorted(self.levels, level).clamp(1, len(self.levels) - 1)
        low, high = self.levels[place - 1], self.levels[place]
        found = (place - 1 + (level - low) / (high - low)).clamp(0, len(self.levels) - 1)
        whole = found.round()
        return torch.where((found - whole).abs() < 0.01, whole, found)

    def forward(self, sample: Tensor, timestep: Tensor, *, return_dict: bool, **arguments: Any) -> tuple[Tensor]:
        """The velocity [N, C, h, w] in float32 of noisy latents [N, C, h, w] on the flow path, at 1000 * level []."""
        level, z = timestep.float() / 1000, sample.float()
        spread = ((1 - level) ** 2 + level**2) ** 0.5  # 1 / (alpha + sigma) of the UNet's path
        own = (z / spread).to(sample.dtype)
        eps = self.network(own, self.timestep(level), return_dict=return_dict, **arguments)[0].float()
        return ((eps - z) / (1 - level),)  # x0 = (z - level eps) / (1 - level)
