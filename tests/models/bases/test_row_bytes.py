"""What a row needs of memory in each family of transformers, against what is allocated step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F

from resmaster_stages.diffusion import memory
from resmaster_stages.models.bases import chroma, flux, flux2, pixart, qwen_image, sd3, z_image
from resmaster_stages.models.bases.base import Geometry, Rows
from resmaster_stages.models.bases.transformer_files import Facts
from resmaster_stages.models.flux_adapters import ReduxEncoder
from resmaster_stages.models.parts import Models
from tests.diffusion.test_memory import Allocations
from tests.tiny_flux import redux, siglip_vision
from tests.tiny_transformers import make_flux, quiet

BLOCKS = {"num_layers": 1, "num_single_layers": 1}
SD3: dict[str, Any] = {"sample_size": 128, "num_layers": 2, "qk_norm": "rms_norm"}
CASES: dict[str, tuple[Any, dict[str, Any], tuple[int, int, int]]] = {
    # kind, what is special to the transformer, and (tokens, width, pooled width) of the text
    "FLUX.1-dev": (flux.KIND, {**BLOCKS, "guidance_embeds": True}, (512, 4096, 768)),
    "Chroma": (chroma.KIND, BLOCKS, (512, 4096, 0)),
    "SD3.5-medium": (
        sd3.KIND,
        {**SD3, "num_attention_heads": 24, "caption_projection_dim": 1536, "dual_attention_layers": (0,)},
        (333, 4096, 2048),
    ),
    "SD3.5-large": (sd3.KIND, {**SD3, "num_attention_heads": 38, "caption_projection_dim": 2432}, (333, 4096, 2048)),
    "PixArt-Sigma": (
        pixart.SIGMA,
        {"num_layers": 2, "caption_channels": 4096, "use_additional_conditions": False},
        (300, 4096, 0),
    ),
    "Z-Image": (z_image.KIND, {"n_layers": 1, "n_refiner_layers": 1}, (512, 2560, 0)),
    "Qwen-Image": (qwen_image.KIND, {"num_layers": 2}, (512, 3584, 0)),
    "FLUX.2-dev": (flux2.DEV, BLOCKS, (512, 15360, 0)),
    "FLUX.2-klein": (
        flux2.KLEIN,
        {**BLOCKS, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
        (512, 7680, 0),
    ),
}


def network(kind: Any, values: dict[str, Any]) -> Any:
    """The transformer in half precision: shapes without values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return getattr(diffusers, kind.transformer)(**values)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("height", "width", "rows"), [(128, 128, 2), (96, 168, 1)])
def test_a_row_needs_what_it_allocates_within_a_tenth(
    monkeypatch: pytest.MonkeyPatch, case: str, height: int, width: int, rows: int
) -> None:
    # attention without a matrix of its scores, as on every GPU
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, *args, **kwargs: torch.empty_like(query))
    kind, values, (tokens, states, pooled) = CASES[case]
    made = network(kind, values)
    facts = Facts("m", {}, dict(made.config), {}, {})
    tokenizer = SimpleNamespace(model_max_length=tokens, chat_template="")
    pipe = SimpleNamespace(**{"transformer": made, "tokenizer": tokenizer, kind.tokenizer: tokenizer})
    base = kind.base(pipe, facts, Geometry(1024, 8, 2))
    with torch.inference_mode():
        half = {"dtype": torch.bfloat16, "device": "meta"}
        mask = torch.ones(rows, tokens, dtype=torch.bool, device="meta")
        texts = (torch.empty(rows, tokens, states, **half), mask, torch.empty(rows, pooled, **half))
        sizes = torch.empty(rows, 6, device="meta")
        told = Rows(*texts, guidance_scale=3.5, sizes=sizes, lengths=(tokens,) * rows)
        sample = torch.empty(rows, base.latent_channels, height, width, **half)
        found = Allocations()
        there = (*made.parameters(), *made.buffers(), sample, texts[0])
        found.alive |= {tensor.untyped_storage()._cdata for tensor in there}
        with found:
            base.denoiser(sample, torch.empty((), device="meta"), return_dict=False, rows=told)
    assert base.row_bytes(height, width) == pytest.approx(found.peak / rows, rel=0.1)


def test_redux_makes_rows_longer() -> None:
    plain, more = make_flux(), make_flux()
    more.register_modules(image_encoder=ReduxEncoder(siglip_vision(), redux()))
    needed = [Models.from_pipeline(quiet(pipe)).base.row_bytes(16, 16) for pipe in (plain, more)]
    assert needed[1] / needed[0] == pytest.approx((64 + 48 + 16) / (64 + 48), rel=1e-4)


def test_the_views_of_a_call_follow_from_the_rows_of_a_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models.from_pipeline(make_flux())
    monkeypatch.setattr(memory, "device_bytes", lambda device: 10**9)
    need = memory.need_of(models, (16, 16), 1)
    assert need is not None
    assert need.view == models.base.row_bytes(16, 16)
