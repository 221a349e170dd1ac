"""What a UNet call needs of memory, against what it allocates step by step; and what is said and done about it."""

import re
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resmaster_stages.diffusion import memory
from resmaster_stages.diffusion.loop import batch_size
from resmaster_stages.diffusion.memory import CPU_VIEWS, Need, preflight, view_limit
from resmaster_stages.diffusion.views import view_grid
from resmaster_stages.errors import OutOfMemory
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases import chroma, flux, flux2, pixart, qwen_image, sd3, z_image
from resmaster_stages.models.bases.base import Geometry, Rows
from resmaster_stages.models.bases.transformer_files import Facts, Kind
from resmaster_stages.models.bases.unet import Unet, row_bytes
from resmaster_stages.models.faults import device_faults
from resmaster_stages.progress import Note, listening
from tests.checkout import ROOT
from tests.methods.common import adapted, plain, request, settings, some_image
from tests.tiny_models import counted, with_base

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
PICTUREBOOK = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (64, 96, 96),
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (2, 3, 3),
    "norm_num_groups": 16,
    "cross_attention_dim": 256,
}


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def _freed(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return output


@contextmanager
def without_values(dtype):
    """Within the block, tensors in `dtype` have shapes alone, and attention no matrix of scores, as on every GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.device("meta"), torch.inference_mode():
            patch.setattr(F, "scaled_dot_product_attention", lambda query, *args, **kwargs: torch.empty_like(query))
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [(SDXL, 128, 128), (SDXL, 96, 168), (SDXL, 256, 256), (SD15, 64, 64), (PICTUREBOOK, 16, 16)],
)
def test_a_row_needs_what_it_allocates_within_a_tenth(shape, height, width):
    with without_values(torch.float16):
        unet, rows = UNet2DConditionModel(**shape), 2
        added = {
            "text_embeds": torch.empty(rows, shape.get("projection_class_embeddings_input_dim", 1536) - 1536),
            "time_ids": torch.empty(rows, 6),
        }
        latents = torch.empty(rows, 4, height, width)
        states = torch.empty(rows, 77, shape["cross_attention_dim"])
        with Allocations() as found:
            unet(latents, torch.tensor(9), encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)
    assert row_bytes(unet, height, width) == pytest.approx(found.peak / rows, rel=0.1)


@dataclass(frozen=True)
class Published:
    """A transformer as it is published, and the texts that it reads."""

    kind: Kind
    network: type
    values: dict[str, Any]
    width: int
    """Numbers of a text state."""
    pooled: int = 0
    masked: bool = False


_KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_LARGE = {"num_layers": 38, "attention_head_dim": 64, "num_attention_heads": 38, "caption_projection_dim": 2432}
_TABLE = {"sample_size": 128, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm"}
_PIXART = {"sample_size": 128, "num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096}
PUBLISHED = {
    "FLUX.1-dev": Published(flux.KIND, diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, 4096, 768),
    "Chroma": Published(chroma.KIND, diffusers.ChromaTransformer2DModel, {}, 4096, masked=True),
    "FLUX.2-dev": Published(flux2.DEV, diffusers.Flux2Transformer2DModel, {}, 15_360),
    "FLUX.2-klein-4B": Published(
        flux2.KLEIN, diffusers.Flux2Transformer2DModel, {**_KLEIN, "guidance_embeds": False}, 7680
    ),
    "Z-Image": Published(z_image.KIND, diffusers.ZImageTransformer2DModel, {}, 2560, masked=True),
    "Qwen-Image": Published(qwen_image.KIND, diffusers.QwenImageTransformer2DModel, {}, 3584, masked=True),
    "Stable Diffusion 3.5 Large": Published(
        sd3.KIND, diffusers.SD3Transformer2DModel, {**_LARGE, **_TABLE}, 4096, 2048
    ),
    "PixArt-Sigma": Published(
        pixart.SIGMA,
        diffusers.PixArtTransformer2DModel,
        {**_PIXART, "use_additional_conditions": False},
        4096,
        masked=True,
    ),
}


def base_of(name):
    """A published model's parts, as the engine sees them."""
    given = PUBLISHED[name]
    network = given.network(**given.values).eval()
    pipe = SimpleNamespace(transformer=network, vae=None, tokenizer=SimpleNamespace(chat_template=""))
    index = {"tokenizer_3": ["transformers", "T5TokenizerFast"]}
    return given.kind.base(pipe, Facts(name, index, dict(network.config), {}, {}), Geometry(1024, 8, 2))


@pytest.mark.parametrize(
    ("name", "height", "width"), [*((name, 128, 128) for name in PUBLISHED), ("FLUX.1-dev", 96, 168)]
)
def test_a_row_of_a_transformer_needs_what_it_allocates_within_a_tenth(name, height, width):
    """With the longest text, in calls of as many rows as a card of 80 GB takes."""
    given, rows = PUBLISHED[name], 32
    with without_values(torch.bfloat16):
        base = base_of(name)
        length = given.kind.tokens(base.facts)
        conditions = Rows(
            states=torch.empty(rows, length, given.width),
            mask=torch.ones(rows, length, dtype=torch.bool) if given.masked else None,
            pooled=torch.empty(rows, given.pooled),
            guidance_scale=4.0,
            sizes=torch.zeros(rows, 6),
            lengths=(length,) * rows,
        )
        latents = torch.empty(rows, base.latent_channels, height, width)
        with Allocations() as found:
            base.denoiser(latents, torch.tensor(600.0), return_dict=False, **base.arguments(conditions))
    assert base.row_bytes(height, width) == pytest.approx(found.peak / rows, rel=0.1)


def test_the_page_on_base_models_tells_what_a_view_takes():
    page = " ".join((ROOT / "docs" / "bases.md").read_text().split())
    sizes = re.findall(r"([\d.]+) GB \(([^)]+)\)", page.partition("is reckoned to take")[2].partition(". ")[0])
    told = {name: size for size, names in sizes for name in names.split(", ")}
    assert len(told) == 4
    for name, size in told.items():
        with without_values(torch.bfloat16):
            assert f"{base_of(name).row_bytes(128, 128) / 1e9:.1f}" == size


def test_the_views_of_a_call_follow_from_the_size_of_the_device(monkeypatch):
    models = adapted()
    assert view_limit(models, None, (16, 16), 2) == CPU_VIEWS
    assert view_limit(models, 5, (16, 16), 2) == 5
    assert memory.need_of(models, (16, 16), 2) is None
    monkeypatch.setattr(memory, "device_bytes", lambda device: 10**9)
    need = memory.need_of(models, (16, 16), 2)
    assert need.view == 2 * row_bytes(models.base.denoiser, 16, 16)
    for views in (1, 7, 49):
        monkeypatch.setattr(
            memory, "device_bytes", lambda device, views=views: int(need.bytes(views) / memory.USABLE) + 1
        )
        assert view_limit(models, None, (16, 16), 2) == views
        assert view_limit(models, None, (16, 16), 1) >= 2 * views
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1)
    assert view_limit(models, None, (16, 16), 2) == 1  # it is tried
    monkeypatch.setattr(Unet, "row_bytes", lambda self, height, width: None)
    other = models
    assert view_limit(other, None, (16, 16), 2) == CPU_VIEWS  # a denoiser of which nothing is known
    assert preflight(other, None, view_grid(Geometry(64, 4), 128, 128, 0.5), 2) == []


def test_sdxl_on_two_cards():
    """4096 px in 49 views of 1024 px, guidance on, float16."""
    unet = SimpleNamespace(config=SimpleNamespace(**SDXL), dtype=torch.float16)
    cards = {
        total: Need(7_000_000_000, 2 * row_bytes(unet, 128, 128), total) for total in (16_000_000_000, 80_000_000_000)
    }
    small, large = cards.values()
    assert (small.fitting, batch_size(49, small.fitting)) == (20, 7)
    assert batch_size(49, large.fitting) == 49
    assert small.sentence(49, "a card", True) == "49 at a time need about 23 GB, and a card has 16 GB: 20 at a time"
    assert (
        small.sentence(49, "a card", False)
        == "49 at a time need about 23 GB, and a card has 16 GB; set upscale.view_batch: 20"
    )
    assert large.sentence(49, "a card", True) == "49 at a time need about 23 GB, and a card has 80 GB"


def test_what_is_needed_is_said_before_the_first_step_and_nothing_on_a_cpu(monkeypatch):
    heard = []

    def draw():
        steps = []
        upscale_image(
            plain(),
            some_image(),
            "a cat",
            config=settings("multidiffusion"),
            progress=lambda *at: steps.append(len(heard)),
        )
        return steps

    with listening(heard.append):
        draw()
        assert heard == []
        monkeypatch.setattr(memory, "device_bytes", lambda device: 1_000_000_000)
        assert draw() == [1, 1]
    (note,) = heard
    assert isinstance(note, Note)
    assert note.line.startswith("128 x 128 px in 9 views: 9 at a time need about")
    assert "and cpu has 1 GB" in note.line


def test_a_vae_that_overflows_in_float16_is_named(monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 1_000_000_000)
    models = plain()
    vae = SimpleNamespace(
        dtype=torch.float16, config=SimpleNamespace(force_upcast=True), parameters=models.base.vae.parameters
    )
    lines = preflight(with_base(models, vae=vae), None, view_grid(Geometry(64, 4), 128, 128, 0.5), 2)
    assert "set model.vae to one that is safe, such as madebyollin/sdxl-vae-fp16-fix" in lines[1]


@pytest.mark.parametrize(("views", "limit", "batch"), [(9, 4, 3), (9, 16, 9)])
def test_memory_that_runs_out_names_the_batch_that_it_ran_out_for(monkeypatch, views, limit, batch):
    models = plain()

    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with counted(models.base.denoiser), monkeypatch.context() as patched:
        patched.setattr(models.base.denoiser, "forward", full)
        with pytest.raises(OutOfMemory) as caught:
            upscale_image(models, some_image(), "a cat", config=settings("multidiffusion", view_batch=limit))
    assert caught.value.batch == batch
    assert len(request(models, settings("multidiffusion")).views()) == views
    with pytest.raises(OutOfMemory) as caught, device_faults("advice"):
        full()
    assert caught.value.batch is None
