"""A ControlNet on views (Zhang et al. 2023): each view is predicted with its own crop of a control image.

At every step the net reads the noisy view, its text and its crop, and adds features to those of the UNet's encoder.
Both guidance branches see the crop. The crops are cut by the views themselves: the control image is folded so that one
cell of it lies under each latent, and `Views.cut` cuts the folded image as it cuts the canvas. So a crop follows its
view wherever the view is, also beyond the canvas, where it is black.

The embedding of a crop does not depend on the step. Each view is embedded once, and again only where views move.

Invariants:
- Where the weight is 0 the net is not called, and the UNet computes what it computes without a ControlNet.
- Item i of a batch depends on the crop of item i alone. A view is embedded alone, so batches do not matter.
- Views that take cells from the whole canvas (`InterleavedViews`) and predictions of other images have no control.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resmaster_stages.config.control import ControlConfig
from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.cost import CONTROL_SHARE, count_call
from resmaster_stages.diffusion.guidance import DenoiserCall
from resmaster_stages.diffusion.irregular_views import InterleavedViews
from resmaster_stages.diffusion.loop import Composition, ViewGroup, Views
from resmaster_stages.diffusion.patches import replaced_forward
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import NO_CONTROL, network_of
from resmaster_stages.models.bases.control_files import MODES, UNION, kind_of, require_fit
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Step


class Control:
    """The ControlNet of `models` with a control image [B, 3, H, W] in [0, 1], of the canvas's size in px.

    Raises ConfigError if there is no ControlNet, or if it does not fit.
    """

    def __init__(self, models: Models, image: Tensor, settings: ControlConfig) -> None:
        if models.control_net is None:
            raise ConfigError(NO_CONTROL.format(models.identity))
        self.models, self.net, self.settings = models, models.control_net, settings
        factor = models.geometry.latent_factor
        described = {"_class_name": type(self.net).__name__, **self.net.config}
        try:
            require_fit(described, network_of(models.base.denoiser).config, factor, settings.image)
        except ConfigError as error:
            raise ConfigError(f"model.controlnet: {error}") from None
        self.number = MODES[settings.image]
        self.kinds: Tensor | None = None  # [kinds of control images], 1 for the one that is shown; for a union net
        if kind_of(described) == UNION:
            self.kinds = torch.zeros(self.net.config.num_control_type)
            self.kinds[self.number] = 1
            self.kinds = self.kinds.to(models.device, self.net.dtype)
        self.folded = F.pixel_unshuffle(image.to(models.device, self.net.dtype), factor)  # [B, 3 f f, h, w]
        self._views: Views | None = None
        self._step: Step | None = None
        self._embedded: Tensor | None = None  # [B * views, C, wh, ww] of the current views

    def applied(self, composition: Composition) -> Composition:
        """`composition` with the ControlNet on all its views that are windows."""
        groups = tuple(map(self._followed, composition.groups))
        return replace(composition, groups=groups, patches=(*composition.patches, self.patch))

    def _followed(self, group: ViewGroup) -> ViewGroup:
        """`group`, which tells where its views are at each step."""

        def at(step: Step) -> tuple[Views, Conditions]:
            views, conditions = group.at(step)
            self._step = None if isinstance(views, InterleavedViews) else step
            if views is not self._views:
                self._views, self._embedded = views, None
            return views, conditions

        return replace(group, at=at)

    def crops(self, views: Views) -> Tensor:
        """The control image of each view: [B * views, 3, wh, ww] in px, items in the order of the views."""
        return F.pixel_shuffle(views.cut(self.folded), self.models.geometry.latent_factor)

    def _weight(self, call: DenoiserCall, states: Tensor) -> float:
        """The net's weight in a call of the UNet that reads the text `states`. 0 for calls that are not of the current
        views, such as predictions of the low-res image."""
        own = states is call.states and call.step is self._step
        return self.settings.weight(call.step.done) if own and call.step is not None else 0.0

    @contextmanager
    def patch(self, denoiser: Any, call: DenoiserCall) -> Iterator[None]:
        """Within the block, the UNet in `denoiser` computes with the net's features."""
        unet, net = network_of(denoiser), self.net
        plain, embedding = unet.forward, net.controlnet_cond_embedding
        embed = embedding.forward

        def forward(sample: Tensor, timestep: Tensor, **arguments: Any) -> Any:
            weight = self._weight(call, arguments["encoder_hidden_states"])
            if not weight:
                return plain(sample, timestep, **arguments)
            if self._embedded is None:
                assert self._views is not None
                self._embedded = torch.cat([embed(crop[None]) for crop in self.crops(self._views)])
            condition = self._embedded[call.items].repeat(len(call.branches), 1, 1, 1)
            down, mid = self._features(sample, timestep, arguments, condition, weight)
            return plain(
                sample,
                timestep,
                **arguments,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            )

        with (
            self.models.using(net),
            replaced_forward(embedding, lambda embedded: embedded),
            replaced_forward(unet, forward),
        ):
            yield

    def _features(
        self, sample: Tensor, timestep: Tensor, arguments: dict[str, Any], condition: Tensor, weight: float
    ) -> tuple[list[Tensor], Tensor]:
        """What the net adds to the UNet's down blocks and to its middle block. condition: embedded crops
        [rows, C, wh, ww]."""
        rows = len(sample)
        count_call(rows, sample[0, 0].numel() / self.models.geometry.native**2, CONTROL_SHARE)
        shown: dict[str, Any] = {"controlnet_cond": condition}
        if self.kinds is not None:
            shown = {"controlnet_cond": [condition], "control_type": self.kinds.expand(rows, -1)}
            shown["control_type_idx"] = [self.number]
        down, mid = self.net(
            sample,
            timestep,
            arguments["encoder_hidden_states"],
            added_cond_kwargs=arguments["added_cond_kwargs"],
            conditioning_scale=weight,
            return_dict=False,
            **shown,
        )
        return down, mid
