"""Z-Image and Z-Image-Turbo.

The transformer reads 2 x 2 latents as a token and one caption of its own length per row: Qwen3's states in the chat
template. It takes 1 - sigma as time and predicts x0 - eps.

Guidance scales are counted as everywhere in this project: 1 is no guidance. diffusers' ZImagePipeline counts one less,
so its `guidance_scale=4` is 5 here, and its 0 is 1. Turbo's guidance is distilled: Turbo takes one branch, few steps
and no negative prompt.

The transformer pads captions to multiples of 32 tokens, and a batch to its longest one. So the calls of one image may
have two or three lengths, each of which compiled blocks are compiled for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import Base, Geometry, Rows, Sampling, Texts, require_readable
from resmaster_stages.models.bases.transformer import Transformer
from resmaster_stages.models.bases.transformer_files import Facts, Kind, family_of_kind
from resmaster_stages.models.flow import flow_schedule, image_shift
from resmaster_stages.models.schedule import Step, Timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def sampling(facts: Facts) -> Sampling:
    """No guidance for Turbo, which its name tells, and classifier-free guidance for all others."""
    turbo = facts.named("turbo") and not facts.named("deturbo", "de-turbo")
    if facts.guidance == "none" or (turbo and facts.guidance != "cfg"):
        return Sampling("none", 8, 1.0, most_steps=30)
    return Sampling("cfg", 50, 5.0)


def path(facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """Evenly spaced levels with the scheduler's own time shift, which is the same for all sizes."""
    return flow_schedule(facts.scheduler, steps, timing, shift=image_shift(facts.scheduler, timing.cells // 4))


def largest_px(facts: Facts, factor: int) -> int:
    """The longest side of a view: the transformer's table of positions ends there."""
    _, rows, columns = facts.transformer.get("axes_lens", (1024, 512, 512))
    return 2 * factor * int(min(rows, columns))


def require_plain(facts: Facts) -> None:
    """Raise ConfigError for a transformer that also reads images."""
    if facts.transformer.get("siglip_feat_dim") is not None:
        raise ConfigError("its transformer also reads images (Z-Image-Omni); give a plain base model")


@dataclass(frozen=True, eq=False)
class ZImage(Transformer):
    """A loaded model."""

    def encode(self, prompts: list[str], negative: bool, device: torch.device) -> Texts:
        """Qwen3's states of each prompt, padded to the longest prompt."""
        from torch.nn.utils.rnn import pad_sequence

        states, _ = self.pipe.encode_prompt(
            list(prompts),  # the pipeline writes its template into the list that it gets
            device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        mask = pad_sequence([each.new_ones(len(each)) for each in states], batch_first=True).bool()
        return Texts(pad_sequence(states, batch_first=True), states[0].new_zeros(len(states), 0), mask)

    def predict(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The velocity eps - x0. Raises ConfigError for views that are larger than the table of positions."""
        import torch

        height, width = (side * self.geometry.latent_factor for side in sample.shape[-2:])
        require_readable(self.geometry, height, width, "a view", "use a method of views, such as resmaster")
        outputs = self.denoiser.network(
            list(sample.unsqueeze(2)),  # [C, 1, h, w] each
            ((1000 - timestep) / 1000).expand(len(sample)),
            [states[:length] for states, length in zip(rows.states, rows.lengths)],
            return_dict=False,
        )[0]
        return -torch.stack(outputs).squeeze(2)


def _z_image(pipe: Any, facts: Facts, geometry: Geometry) -> Base:
    return ZImage.of(KIND, pipe, facts, geometry)


KIND = Kind(
    name="Z-Image",
    pipelines="ZImage(Img2Img)?Pipeline",
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    vae="AutoencoderKL",
    channels=16,
    in_channels=lambda transformer: transformer["in_channels"],
    abilities=frozenset({"positions"}),
    template=8,
    chat=True,
    largest_px=largest_px,
    require=require_plain,
    sampling=sampling,
    path=path,
    base=_z_image,
    live=15.8,
)

Z_IMAGE = family_of_kind(KIND)
