"""Rotary positions beyond the native size: frequencies, attention, and diffusers' own transformers with them."""

from math import log, sqrt

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from resmaster_stages.diffusion.positions import (
    _KINDS,
    Scaling,
    angles,
    ntk_frequencies,
    own_frequencies,
    proportional_factor,
    scaled_positions,
    yarn_frequencies,
    yarn_temperature,
)
from resmaster_stages.errors import ConfigError

FLUX = {"dim": 56, "theta": 10_000.0}
NATIVE = 8


def scaling(kind="own", attention="plain", height=16, width=32, native=NATIVE, text=3):
    return Scaling(kind, attention, height, width, native, text)


def frequencies_of(rotation):
    """The frequencies [D / 2] of a table (cos, sin) [S, D] whose second row is position 1."""
    cos, sin = rotation
    return torch.atan2(sin[1], cos[1])[::2]


def of_diffusers(**factors):
    table = get_1d_rotary_pos_embed(FLUX["dim"], torch.arange(2.0), FLUX["theta"], use_real=True, **factors)
    return frequencies_of(table).double()


@pytest.mark.parametrize("stretch", [1.0, 1.5, 2.0, 4.0, 16.0])
def test_ntk_is_that_of_diffusers_with_linear_interpolation_as_its_floor(stretch):
    expected = torch.maximum(of_diffusers(ntk_factor=10.0), of_diffusers(linear_factor=stretch))
    torch.testing.assert_close(ntk_frequencies(**FLUX, stretch=stretch), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("stretch", [1.0, 1.5, 4.0])
@pytest.mark.parametrize(("dim", "theta", "native"), [(56, 10_000.0, 64), (48, 256.0, 64), (128, 10_000.0, 4096)])
def test_yarn_is_that_of_transformers(dim, theta, native, stretch):
    config = PretrainedConfig(head_dim=dim, hidden_size=dim, num_attention_heads=1, max_position_embeddings=native)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": stretch,
        "original_max_position_embeddings": native,
    }
    expected, temperature = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(yarn_frequencies(dim, theta, stretch, native).float(), expected, atol=1e-7, rtol=1e-5)
    assert yarn_temperature(stretch) == pytest.approx(temperature)


@pytest.mark.parametrize("scaled", [ntk_frequencies, lambda **axis: yarn_frequencies(**axis, native=64)])
def test_neighbours_stay_apart_and_the_longest_waves_stay_within_what_was_trained(scaled):
    own, four = own_frequencies(**FLUX), scaled(**FLUX, stretch=4.0)
    assert torch.equal(scaled(**FLUX, stretch=1.0), own)
    assert four[0] == own[0] == 1
    assert (four <= own).all()
    assert (four >= own / 4 * (1 - 1e-12)).all()
    slow = own * 64 < 0.2  # pairs that turn by a small angle within the native size
    assert slow.sum() > 8
    assert (four[slow] * 256 <= own[slow] * 64 * (1 + 1e-12)).all()


def test_rows_and_columns_are_stretched_each_by_its_own_length():
    stretched = scaling("ntk", height=16, width=32)
    assert stretched.stretches == (2.0, 4.0)
    for axis, dim, stretch in ((0, 16, 1.0), (1, 56, 2.0), (2, 56, 4.0), (3, 16, 1.0)):
        assert torch.equal(stretched.frequencies(axis, dim, 10_000.0), ntk_frequencies(dim, 10_000.0, stretch))
    small = scaling("yarn", height=4, width=8)
    assert (small.stretches, small.length) == ((1.0, 1.0), 1.0)
    assert torch.equal(small.frequencies(1, 56, 10_000.0), own_frequencies(56, 10_000.0))


def test_the_factor_on_attention_is_that_of_the_papers():
    """I-Max: sqrt(log_4608(L) / d) instead of sqrt(1 / d), 4608 = 64^2 + 512 tokens of text."""
    assert proportional_factor(4608, 4608) == 1
    assert proportional_factor(4608**4, 4608) == pytest.approx(2)
    at_4k = Scaling("ntk", "proportional", 256, 256, 64, 512)
    assert at_4k.length**2 == pytest.approx(sqrt(log(256**2 + 512) / log(4608)))
    assert scaling("ntk").length == 1
    assert scaling("yarn").length == pytest.approx(0.1 * log(sqrt(8)) + 1)
    assert scaling("yarn", "proportional") != scaling("yarn")
    assert scaling("yarn", "proportional").length == scaling("own", "proportional").length


def test_a_shift_of_all_positions_leaves_what_attention_sees():
    """Rotary positions are relative: the product of a turned query and key depends on their distance."""
    query, key = torch.randn(2, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stretched, dims = scaling("yarn"), (4, 16, 16)

    def score(here, there):
        turned = angles(torch.tensor([here, there]), dims, 10_000.0, stretched)
        z = torch.view_as_complex(torch.stack([query, key]).reshape(2, -1, 2)) * torch.polar(
            torch.ones_like(turned), turned
        )
        return float((z[0] * z[1].conj()).real.sum())

    assert score([0, 1, 2], [0, 5, 9]) == pytest.approx(score([7, 21, 32], [7, 25, 39]))
    assert score([0, 1, 2], [0, 5, 9]) != pytest.approx(score([0, 1, 2], [0, 5, 10]), rel=1e-3)


# -------------------------------------------------------------------------------------- diffusers' own embeddings


def flux_ids(rows, cols, text=3, axes=3):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    image = torch.zeros(rows * cols, axes)
    image[:, 1], image[:, 2] = y.flatten(), x.flatten()
    words = torch.zeros(text, axes)
    words[:, axes - 1] = torch.arange(text) if axes == 4 else 0
    return torch.cat([words, image])


EMBEDDINGS = {
    "flux": (FluxPosEmbed(10_000, [16, 56, 56]), lambda: (flux_ids(9, 5),), {}),
    "flux2": (Flux2PosEmbed(2_000, [32, 32, 32, 32]), lambda: (flux_ids(9, 5, axes=4),), {}),
    "qwen": (
        QwenEmbedRope(10_000, [16, 56, 56], scale_rope=True),
        lambda: ([[(1, 9, 6), (1, 5, 7)]] * 2,),
        {"max_txt_seq_len": 11, "device": torch.device("cpu")},
    ),
    "qwen from its corner": (
        QwenEmbedRope(10_000, [16, 56, 56]),
        lambda: ([(1, 9, 6)],),
        {"max_txt_seq_len": 11, "device": torch.device("cpu")},
    ),
    "z_image": (RopeEmbedder(256.0, [32, 48, 48], [64, 32, 32]), lambda: (flux_ids(9, 5).int() + 1,), {}),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_at_the_native_size_all_of_it_is_diffusers_own(kind):
    own, arguments, more = EMBEDDINGS[kind]
    ours = _KINDS[type(own).__name__](own, scaling("yarn", height=NATIVE, width=NATIVE))
    expected, computed = own(*arguments(), **more), ours(*arguments(), **more)
    torch.testing.assert_close(computed, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
def test_the_table_of_flux_has_the_frequencies_of_each_axis(kind):
    own = EMBEDDINGS["flux"][0]
    stretched = scaling(kind, "proportional")
    cos, sin = _KINDS["FluxPosEmbed"](own, stretched)(torch.ones(2, 3))
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, stretched.length**2))
    expected = torch.cat([stretched.frequencies(axis, dim, 10_000) for axis, dim in enumerate((16, 56, 56))])
    torch.testing.assert_close(frequencies_of((cos, sin)).double(), expected, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------- diffusers' transformers


def drawn(model):
    """Random weights everywhere, zeros included, so that nothing is switched off."""
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * (0.3 if value.ndim > 1 else 0.1)
    return model.eval().requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux():
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )

    def call(rows, cols):
        return model(
            hidden_states=noise(1, rows * cols, 16),
            encoder_hidden_states=noise(1, 3, 32, seed=1),
            pooled_projections=noise(1, 32, seed=2),
            timestep=torch.tensor([0.5]),
            txt_ids=torch.zeros(3, 3),
            img_ids=flux_ids(rows, cols, text=0),
            return_dict=False,
        )[0]

    return drawn(model), call


def flux2():
    model = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )

    def call(rows, cols):
        ids = flux_ids(rows, cols, axes=4)
        return model(
            hidden_states=noise(1, rows * cols, 32),
            encoder_hidden_states=noise(1, 3, 24, seed=1),
            timestep=torch.tensor([0.5]),
            txt_ids=ids[:3],
            img_ids=ids[3:],
            guidance=None,
            return_dict=False,
        )[0]

    return drawn(model), call


def qwen():
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )

    def call(rows, cols):
        return model(
            hidden_states=noise(1, rows * cols, 64),
            encoder_hidden_states=noise(1, 3, 16, seed=1),
            encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, rows, cols)]],
            return_dict=False,
        )[0]

    return drawn(model), call


def z_image():
    model = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )

    def call(rows, cols):
        return model([noise(16, 1, 2 * rows, 2 * cols)], torch.tensor([0.5]), [noise(3, 16, seed=1)])[0][0]

    return drawn(model), call


MODELS = {"flux": flux, "flux2": flux2, "qwen": qwen, "z_image": z_image}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.inference_mode()
def test_a_transformer_at_its_native_size_is_not_changed_and_beyond_it_is(model):
    network, call = model
    native, beyond = call(NATIVE, NATIVE), call(16, 32)
    for kind in ("own", "ntk", "yarn"):
        with scaled_positions(network, scaling(kind, height=NATIVE, width=NATIVE)):
            torch.testing.assert_close(call(NATIVE, NATIVE), native, atol=1e-4, rtol=1e-4)
    with scaled_positions(network, scaling()):
        torch.testing.assert_close(call(16, 32), beyond, atol=1e-4, rtol=1e-4)
    results = [beyond]
    for choice in (("ntk", "plain"), ("yarn", "plain"), ("own", "proportional")):
        with scaled_positions(network, scaling(*choice)):
            results.append(call(16, 32))
    for number, one in enumerate(results):
        for other in results[:number]:
            assert (one - other).abs().max() > 1e-3
    assert torch.equal(call(16, 32), beyond)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen"])
def test_proportional_attention_multiplies_all_scores(name, monkeypatch):
    network, call = MODELS[name]()
    stretched = scaling(attention="proportional")
    with scaled_positions(network, stretched):
        ours = call(16, 32)
    plain = F.scaled_dot_product_attention
    factor = sqrt(log(16 * 32 + 3) / log(NATIVE**2 + 3))

    def sharper(query, *args, **kwargs):
        return plain(query * factor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sharper)
    torch.testing.assert_close(ours, call(16, 32), atol=1e-3, rtol=1e-3)


def test_an_exception_restores_the_transformer(model):
    network, _ = model
    name = "pos_embed" if hasattr(network, "pos_embed") else "rope_embedder"
    before = getattr(network, name)
    with pytest.raises(RuntimeError, match="boom"), scaled_positions(network, scaling("ntk")):
        raise RuntimeError("boom")
    assert getattr(network, name) is before
    assert "forward" not in vars(before)


def test_a_transformer_without_rotary_positions_is_refused():
    network = SD3Transformer2DModel(
        sample_size=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
    )
    with pytest.raises(ConfigError, match="SD3Transformer2DModel has no rotary positions"):
        scaled_positions(network, scaling("ntk")).__enter__()
