"""FLUX.1 and Chroma through the engine, beside diffusers' own pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.diffusion.autoencoder import decode
from resmaster_stages.diffusion.conditions import make_conditions
from resmaster_stages.diffusion.guidance import TEXT
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.models.bases import family_of_pipeline
from resmaster_stages.models.bases.transformer import packed, unpacked
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from tests.models.bases.common import engine, relative, start
from tests.tiny_flux import make_chroma
from tests.tiny_transformers import make_flux

TOKENS = 48
SIZES = [(64, 64), (48, 80), (40, 24)]
PROMPTS = ("a cat", "a big house, red, of old stones and wood")
NEGATIVE = ("ugly", "blurred, of low contrast")


@dataclass(frozen=True)
class Case:
    """A variant of a family: its pipeline, and how its guidance is asked for."""

    pipe: Any
    config: ModelConfig
    scale: float
    guided: bool = False

    @property
    def models(self) -> Models:
        return Models.from_pipeline(self.pipe, config=self.config)

    def theirs(self, noise: Tensor, steps: int, output_type: str = "latent", **values: Any) -> Any:
        """What the pipeline makes of the same noise."""
        factor = self.models.geometry.latent_factor
        sizes = {"height": noise.shape[-2] * factor, "width": noise.shape[-1] * factor, "num_inference_steps": steps}
        return self.pipe(
            **sizes,
            **self._texts(noise.shape[0]),
            **values,
            guidance_scale=self.scale,
            latents=packed(noise),
            output_type=output_type,
        ).images

    def _texts(self, count: int) -> dict[str, Any]:
        if type(self.pipe).__name__ == "ChromaPipeline":
            return chroma_texts(self.pipe, count)
        guided = {"true_cfg_scale": self.scale, "negative_prompt": list(NEGATIVE[:count])}
        return {"prompt": list(PROMPTS[:count]), "max_sequence_length": TOKENS, **(guided if self.guided else {})}


def chroma_texts(pipe: Any, count: int) -> dict[str, Any]:
    """Chroma's texts with masks of truth values: the pipeline's own are numbers, which attention adds to its scores."""
    states, _, mask, other, _, other_mask = pipe.encode_prompt(
        list(PROMPTS[:count]), list(NEGATIVE[:count]), max_sequence_length=TOKENS
    )
    return {
        "prompt_embeds": states,
        "prompt_attention_mask": mask.bool(),
        "negative_prompt_embeds": other,
        "negative_prompt_attention_mask": other_mask.bool(),
    }


CASES = {
    "dev": lambda: Case(make_flux(), ModelConfig(), 3.5),
    "schnell": lambda: Case(make_flux(guidance_embeds=False), ModelConfig(), 1.0),
    "cfg": lambda: Case(make_flux(), ModelConfig(guidance="cfg"), 4.0, guided=True),
    "chroma": lambda: Case(make_chroma(), ModelConfig(), 5.0, guided=True),
    "chroma without guidance": lambda: Case(make_chroma(), ModelConfig(guidance="none"), 1.0),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def ours(case: Case, noise: Tensor, steps: int, **values: Any) -> Tensor:
    count = len(noise)
    return engine(
        case.models, noise, PROMPTS[:count], NEGATIVE[:count], steps=steps, guidance_scale=case.scale, **values
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_view_is_what_the_pipeline_draws(case: Case, height: int, width: int, batch: int) -> None:
    noise = start(case.models, height, width, batch=batch)
    expected = unpacked(case.theirs(noise, 6), *noise.shape[-2:])
    made = ours(case, noise, 6)
    assert relative(made, expected) < 1e-5
    if batch == 2:
        assert relative(made[:1], made[1:]) > 0.05


def test_the_levels_are_the_pipelines(case: Case) -> None:
    noise = start(case.models, 48, 64)
    case.theirs(noise, 7)
    path = case.models.base.path(7, Timing(12 * 16))
    assert [step.sigma for step in path] + [path[-1].sigma_next] == case.pipe.scheduler.sigmas.tolist()
    assert [step.t for step in path] == case.pipe.scheduler.timesteps.tolist()


def test_the_image_is_the_pipelines(case: Case) -> None:
    noise = torch.randn(1, 16, 16, 12, generator=torch.Generator().manual_seed(9))
    expected = case.theirs(noise, 4, "np")[0]
    made = next(generate(case.models, PROMPTS[:1], NEGATIVE[:1], [9], 64, 48, 4, case.scale, 1))
    assert np.abs(np.asarray(made) - expected * 255).max() <= 1


def test_the_vae_reads_what_the_pipelines_vae_reads(case: Case) -> None:
    base = case.models.base
    latents = start(case.models, 64, 64)
    assert torch.allclose(base.from_canvas(base.to_canvas(latents)), latents, atol=1e-6)
    config = case.pipe.vae.config
    expected = case.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
    assert torch.equal(decode(case.models, latents), expected)


def predicted(case: Case, prompts: tuple[str, ...], order: list[int], image: Tensor | None = None) -> Tensor:
    """The prediction for one view per prompt, all in one call, of the views `order`."""
    models = case.models
    conditions = make_conditions(
        models,
        view_grid(models.geometry, 64, 64, 1.0),
        prompts,
        ("",) * len(prompts),
        guidance_scale=1.0,
        image=None if image is None else (image, image),
    )
    views = start(models, 64, 64, batch=len(prompts))
    rows = conditions.rows(torch.tensor(order), (TEXT,))
    with torch.inference_mode():
        return models.base.denoiser(
            views[order], torch.tensor(500.0), return_dict=False, **models.base.arguments(rows)
        )[0]


def test_permuted_views_give_permuted_predictions(case: Case) -> None:
    prompts = ("a cat", "a dog", "a red house")
    plain = predicted(case, prompts, [0, 1, 2])
    assert relative(plain[:1], plain[1:2]) > 0.05
    assert torch.equal(predicted(case, prompts, [2, 0, 1]), plain[[2, 0, 1]])


def test_another_items_caption_changes_nothing(case: Case) -> None:
    short = predicted(case, ("a cat", "a dog"), [0, 1])
    long = predicted(case, ("a cat", "a dog that runs over a wide field of grass"), [0, 1])
    assert relative(short[:1], long[:1]) < 1e-6
    assert relative(short[1:], long[1:]) > 0.01


def test_pads_are_read_by_flux_and_hidden_from_chroma(case: Case) -> None:
    texts = case.models.base.encode(["ab"], False, torch.device("cpu"))
    if type(case.pipe).__name__ == "FluxPipeline":
        assert texts.mask is None
        assert texts.states.shape[1] == TOKENS
    else:
        assert texts.mask is not None
        assert texts.mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3]  # a, b, </s> and the first pad token
        assert texts.pooled.shape == (1, 0)


class Stored(torch.nn.Module):
    """A linear layer whose weights are stored in 8 bits, as quantised transformers have them."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        low, high = float(plain.weight.min()), float(plain.weight.max())
        self.low, self.step, self.bias = low, (high - low) / 255, plain.bias
        stored = ((plain.weight.float() - low) / self.step).round().to(torch.uint8)
        self.weight = torch.nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight.float() * self.step + self.low).to(x.dtype)
        return torch.nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("told", ["compute_dtype", "bnb_4bit_compute_dtype", None])
def test_a_users_quantised_transformer_gets_rows_in_the_format_that_it_computes_in(told: str | None) -> None:
    plain, pipe = make_flux().to(torch.bfloat16), make_flux().to(torch.bfloat16)
    network = pipe.transformer
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, Stored(getattr(block.attn, name)))
    network.x_embedder = Stored(network.x_embedder)
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace())
    if told == "compute_dtype":
        quantizer.compute_dtype = torch.bfloat16
    elif told:
        setattr(quantizer.quantization_config, told, torch.bfloat16)
    network.hf_quantizer = quantizer
    models = Models.from_pipeline(pipe)
    assert models.dtype == models.base.denoiser.dtype == torch.bfloat16
    noise = start(models, 48, 64)
    made, expected = (
        engine(each, noise, PROMPTS[:1], steps=3, guidance_scale=3.5) for each in (models, Models.from_pipeline(plain))
    )
    assert 0 < relative(made, expected) < 0.05


def test_the_pipelines_of_other_tasks_are_refused_in_one_line() -> None:
    for name in ("Control", "ControlInpaint", "ControlImg2Img", "Fill", "Kontext", "KontextInpaint", "PriorRedux"):
        pipe = type(f"Flux{name}Pipeline", (), {})()
        with pytest.raises(ConfigError, match=f"model m: is a Flux{name}Pipeline, and the known families .* give a"):
            family_of_pipeline(pipe, "m")
    for name in ("Flux", "FluxImg2Img", "FluxInpaint", "FluxControlNet", "FluxControlNetImg2Img"):
        assert family_of_pipeline(type(f"{name}Pipeline", (), {})(), "m").name == "FLUX.1"
    for name in ("Chroma", "ChromaImg2Img", "ChromaInpaint"):
        assert family_of_pipeline(type(f"{name}Pipeline", (), {})(), "m").name == "Chroma"
