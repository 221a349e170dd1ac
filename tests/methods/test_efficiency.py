"""What the methods do not do twice: counted, never timed."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resmaster_stages.diffusion import dispersion, frequency, low_pass, scale_fusion
from resmaster_stages.diffusion.loop import CanvasNoise, denoise
from resmaster_stages.methods.upscale import upscale_image
from tests.methods.common import adapted, plain, request, schedule, settings, some_image
from tests.tiny_models import counted


def make(method, **values):
    return upscale_image(plain(), some_image(), "a cat", config=settings(method, **values))


def test_fouriscale_builds_each_filter_once(monkeypatch):
    built = []
    original = torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda *args, **kwargs: built.append(1) or original(*args, **kwargs))
    low_pass.filter_matrix.cache_clear()
    make("fouriscale", steps=10)
    # strong and weak, at the UNet's two levels, at dilation 2 and at those that fall from step 4 to 7
    assert 0 < len(built) <= 2 * 2 * 4
    built.clear()
    make("fouriscale", steps=10)
    assert built == []


def test_no_spectrum_of_features_is_ever_computed(monkeypatch):
    for name in ("fft2", "ifft2", "rfft2", "irfft2", "fftn"):
        monkeypatch.setattr(torch.fft, name, lambda *args, name=name, **kwargs: pytest.fail(name))
    make("fouriscale", steps=2)
    make("freescale", steps=2)


@pytest.mark.parametrize(("method", "scale", "most"), [("freescale", 2, 1), ("demofusion", 2, 10)])
def test_blur_kernels_are_made_once(method, scale, most):
    """FreeScale's never changes; DemoFusion's changes from step to step."""
    kernel = frequency._gaussian_kernel
    kernel.cache_clear()
    make(method, scale=scale, steps=10)
    assert 0 < kernel.cache_info().misses <= most
    make(method, scale=scale, steps=10)
    assert kernel.cache_info().misses <= most
    assert kernel.cache_info().hits > 0


def test_dispersed_kernels_are_solved_once_and_spread_once_per_image(monkeypatch):
    dispersion.dispersion_matrix.cache_clear()
    spread = []
    original = dispersion.dispersed_weight
    monkeypatch.setattr(
        "resmaster_stages.diffusion.dispersion.dispersed_weight", lambda w: spread.append(1) or original(w)
    )
    make("scalecrafter", scale=3, steps=6, dispersed=True)
    layers = len(spread)
    make("scalecrafter", scale=3, steps=6, dispersed=True)
    assert len(spread) == 2 * layers > 0
    assert dispersion.dispersion_matrix.cache_info().misses == 1


def test_the_weakly_dilated_network_computes_the_unconditional_half_alone():
    with counted(plain().base.denoiser) as shapes:
        make("scalecrafter", scale=3, steps=4)
    assert [shape[0] for shape in shapes] == [3, 3, 3, 2]  # not 4: negative, text, weak negative


def test_fouriscale_s_third_branch_ends_with_its_schedule():
    with counted(plain().base.denoiser) as shapes:
        make("fouriscale", steps=10)
    assert [shape[0] for shape in shapes] == [3] * 7 + [2] * 3


def test_freescale_projects_once_on_the_canvas_and_runs_its_windows_as_one_batch(monkeypatch):
    ours, projected, batches = plain(), Counter(), []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: projected.update({(name, tuple(inputs[0].shape[:2])): 1})
        )
        for name, module in ours.base.denoiser.named_modules()
        if name.endswith((".attn1.to_q", ".attn1.to_k", ".attn1.to_v"))
    ]
    attend = scale_fusion.attend
    monkeypatch.setattr(
        scale_fusion, "attend", lambda q, k, v, heads: batches.append(tuple(q.shape[:2])) or attend(q, k, v, heads)
    )
    try:
        make("freescale", steps=2, start=0.0)
    finally:
        for hook in hooks:
            hook.remove()
    calls = 2
    layers = sum(name.endswith(".attn1") for name, _ in ours.base.denoiser.named_modules())
    assert projected
    assert {rows_and_tokens for _, rows_and_tokens in projected} == {(2, 16 * 16)}  # the canvas of 32 x 32, halved once
    assert set(projected.values()) == {calls}  # not once for the canvas and once per window
    assert Counter(batches) == {(2, 256): calls * layers, (2 * 9, 64): calls * layers}


def test_image_prompts_and_captions_are_encoded_once():
    encoded = Counter()
    models = adapted()
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: encoded.update([name]))
        for name, module in (("image", models.base.image_encoder), ("text", models.base.text_encoders[0]))
    ]
    try:
        upscale_image(
            models, some_image(), "a cat", config=settings("resmaster", steps=4), captions=["a cat", "b"] + ["c"] * 7
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert encoded == {"image": 1, "text": 2}  # nine crops in one batch; captions, and the negative prompt


class Waits(TorchDispatchMode):
    """Collects operations whose result the host has to have before it can go on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("resmaster", {}),
        ("resmaster", {"preset": "exact"}),
        ("multidiffusion", {"shift": "every_step", "stepper": "dpmpp_2m", "guidance_stop": 0.5}),
        ("c_upscale", {}),
        ("direct", {}),
        ("direct", {"guidance_low": 1.0}),
        ("cascade", {"phases": "last", "swap": "pixels", "guidance_low": 2.0}),
        ("scalecrafter", {}),
        ("fouriscale", {}),
    ],
)
def test_no_step_waits_for_the_device(method, values):
    """Methods that draw places at random read them from a generator of the host, which is no wait."""
    models = adapted()
    asked = request(models, settings(method, scale=4, steps=6, **values))
    (stage,) = asked.config.passes(asked)
    noise, path = CanvasNoise([3], 4, *asked.canvas_size, models.device), schedule(6)[stage.first :]
    z, composition = stage.begin(None, noise, path[0])
    denoise(models, composition, path, z, noise, view_batch=asked.view_limit)  # filters are made once, on the host
    z, composition = stage.begin(None, noise, path[0])
    with Waits() as waits:
        denoise(models, composition, path, z, noise, view_batch=asked.view_limit)
    assert waits.found == []
    with Waits() as waits:
        float(z.sum())
    assert waits.found == ["_local_scalar_dense"]
