"""Flow-matching paths: their levels, their steps, and the noise levels that settings name."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift as qwen_shift

from resmaster_stages.diffusion.conditions import Conditions
from resmaster_stages.diffusion.fusing import Fuser
from resmaster_stages.diffusion.guidance import ClassifierFree
from resmaster_stages.diffusion.loop import Composition, ViewGroup, always, denoise
from resmaster_stages.diffusion.steppers import (
    STEPPERS,
    ddim_ancestral,
    ddim_implied,
    ddim_keep,
    make_stepper,
    posterior,
)
from resmaster_stages.diffusion.text import TextEmbeddings
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.flow import SCHEDULER, empirical_shift, flow_path, flow_schedule, image_shift
from resmaster_stages.models.schedule import Step, Timing, course_of, make_schedule
from tests.methods.common import plain
from tests.tiny_models import SCHEDULER as BETAS
from tests.tiny_models import with_base

STATIC = {"_class_name": SCHEDULER, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
DYNAMIC = {
    "_class_name": SCHEDULER,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
QWEN = {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02, "shift": 1.0}
NATIVE = Timing(128 * 128)


def never():
    raise AssertionError("this stepper must not draw noise")


def scheduler_of(config, count, *, spaced=True, mu=None, **changes):
    """diffusers' scheduler, with its timesteps set as a pipeline sets them."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"}, **changes)
    sigmas = np.linspace(1.0, 1 / count, count) if spaced else None
    scheduler.set_timesteps(None if spaced else count, sigmas=sigmas, mu=mu)
    return scheduler


def require_same(path, scheduler):
    levels = [step.sigma for step in path] + [path[-1].sigma_next]
    torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas, atol=0, rtol=0)
    torch.testing.assert_close(torch.tensor([step.t for step in path]), scheduler.timesteps, atol=0, rtol=0)
    assert all(step.alpha == 1 - step.sigma and step.alpha_next == 1 - step.sigma_next for step in path)
    assert all(a.sigma_next == b.sigma for a, b in itertools.pairwise(path))
    assert (path[0].sigma, path[0].alpha, path[-1].sigma_next) == (1, 0, 0)


# ------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("count", [1, 4, 8, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6889])
def test_levels_of_flux_are_those_of_diffusers(count, tokens):
    dev = scheduler_of(DYNAMIC, count, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    require_same(flow_schedule(DYNAMIC, count, NATIVE, shift=image_shift(DYNAMIC, tokens)), dev)
    schnell = {**STATIC, "shift": 1.0}
    require_same(flow_schedule(schnell, count, NATIVE), scheduler_of(schnell, count))
    second = scheduler_of(DYNAMIC, count, mu=compute_empirical_mu(tokens, count))
    require_same(flow_schedule(DYNAMIC, count, NATIVE, shift=empirical_shift(tokens, count)), second)


@pytest.mark.parametrize("count", [2, 4, 8, 50])
@pytest.mark.parametrize("tokens", [1024, 4096, 6889])
def test_levels_of_qwen_image_end_at_its_last_level(count, tokens):
    path = flow_schedule(QWEN, count, NATIVE, shift=image_shift(QWEN, tokens))
    require_same(path, scheduler_of(QWEN, count, mu=qwen_shift(tokens, 256, 8192, 0.5, 0.9)))
    assert path[-1].sigma == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("count", [1, 8, 9, 28])
def test_levels_of_z_image_and_of_stable_diffusion_3(count):
    require_same(flow_schedule(STATIC, count, NATIVE), scheduler_of(STATIC, count))
    require_same(flow_schedule(STATIC, count, NATIVE, spaced=False), scheduler_of(STATIC, count, spaced=False))


@pytest.mark.parametrize("wish", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("count", [4, 20])
def test_levels_that_are_spaced_in_another_way(wish, count):
    config = {**STATIC, wish: True}
    path = flow_schedule(config, count, NATIVE)
    require_same(path, scheduler_of(config, count))
    assert path != flow_schedule(STATIC, count, NATIVE)


def test_stable_diffusion_3_applies_its_shift_twice_to_the_last_level():
    assert flow_schedule(STATIC, 28, NATIVE, spaced=False)[-1].sigma == pytest.approx(0.0089, abs=5e-5)
    assert flow_schedule(STATIC, 28, NATIVE)[-1].sigma == pytest.approx(0.1, abs=5e-3)


def test_time_shifts_of_known_image_sizes():
    shifts = {side: image_shift(DYNAMIC, (side // 16) ** 2) for side in (1024, 1328, 2048)}
    assert shifts == pytest.approx({1024: 3.16, 1328: 5.07, 2048: 25.3}, rel=5e-3)
    assert [image_shift(QWEN, n) for n in (4096, 6889, 16384)] == pytest.approx([2.0, 2.3, 3.7], rel=0.02)
    assert empirical_shift(4096, 50) == pytest.approx(7.6, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 1.7, 4.0])
def test_a_time_shift_grows_or_is_replaced(factor):
    own, grown, fixed = image_shift(DYNAMIC, 4096), Timing(1, growth=factor), Timing(1, shift=factor)
    cases = [
        (flow_schedule(DYNAMIC, 20, grown, shift=own), scheduler_of(DYNAMIC, 20, mu=math.log(own * factor))),
        (flow_schedule(DYNAMIC, 20, fixed, shift=own), scheduler_of(DYNAMIC, 20, mu=math.log(factor))),
        (flow_schedule(STATIC, 20, grown), scheduler_of(STATIC, 20, shift=3 * factor)),
        (flow_schedule(STATIC, 20, fixed), scheduler_of(STATIC, 20, shift=factor)),
        (
            flow_schedule(STATIC, 20, fixed, spaced=False),
            scheduler_of(STATIC, 20, spaced=False, shift=factor),
        ),
    ]
    linear = {**DYNAMIC, "time_shift_type": "linear"}
    cases.append((flow_schedule(linear, 20, grown, shift=own), scheduler_of(linear, 20, mu=own * factor)))
    for path, scheduler in cases:
        require_same(path, scheduler)


def test_a_prediction_type_is_not_read_as_diffusers_does_not_read_it():
    assert flow_schedule({**STATIC, "prediction_type": "epsilon"}, 4, NATIVE) == flow_schedule(STATIC, 4, NATIVE)


@pytest.mark.parametrize("shift", [1.3, 2.6, 3.1, 3.7, 6.1, 7.3, 11.9])
@pytest.mark.parametrize("stepper", ["ddim_implied", "posterior", "ddim_ancestral", "dpmpp_2m"])
def test_rounding_puts_no_level_above_one(shift, stepper):
    path = flow_schedule(STATIC, 5, Timing(1, shift=shift))
    assert all(step.alpha >= 0 and step.sigma <= 1 for step in path)
    assert torch.isfinite(
        run(make_stepper(stepper), path, torch.ones(1, 1, 2, 2), lambda: torch.ones(1, 1, 2, 2))
    ).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "not the scheduler of a flow-matching model.*use a model with",
        ),
        ({"_class_name": "EulerDiscreteScheduler"}, "not the scheduler of a flow-matching model"),
        ({"invert_sigmas": True}, "invert_sigmas is not supported; set it to false"),
        ({"stochastic_sampling": True}, "stochastic_sampling is not supported"),
        ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "only one of use_karras_sigmas, .* can be true"),
        ({"use_beta_sigmas": "yes"}, "use_beta_sigmas is 'yes' and must be true or false"),
        ({"num_train_timesteps": 500}, "num_train_timesteps other than 1000"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000' and must be a number"),
        ({"time_shift_type": "sudden"}, "time_shift_type 'sudden' is not known; use exponential or linear"),
        ({"time_shift_type": ["linear"]}, "time_shift_type .* is not known"),
        ({"shift": "3"}, "shift is '3' and must be a number; download"),
        ({"shift": None}, "shift is None and must be a number"),
        ({"shift": True}, "shift is True and must be a number"),
        ({"shift": float("nan")}, "shift is nan and must be a number"),
        ({"shift": [3.0] * 1000}, r"shift is \[3.0, [3.0, ]* and must be a number"),
        ({"shift": 0}, "shift is 0 and must be greater than 0"),
        ({"shift": -3.0}, "shift is -3.0 and must be greater than 0"),
        ({"shift": 1e30}, "with a time shift of 1e[+]30, 20 steps have no 20 noise levels; use fewer steps"),
        ({"shift_terminal": "0.02"}, "shift_terminal is '0.02' and must be a number"),
        ({"shift_terminal": 1.5}, "shift_terminal is 1.5 and must be from 0 to 1"),
        ({"shift_terminal": -0.5}, "shift_terminal is -0.5"),
    ],
    ids=str,
)
def test_schedulers_that_do_not_fit_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        flow_schedule({**STATIC, **changes}, 20, NATIVE)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_shift": "0.5"}, "base_shift is '0.5' and must be a number"),
        ({"max_shift": None}, "max_shift is None and must be a number"),
        ({"max_image_seq_len": 256}, "max_image_seq_len must be greater than base_image_seq_len"),
        ({"base_image_seq_len": [1]}, r"base_image_seq_len is \[1\]"),
        ({"max_shift": 1e9}, "leaves no noise levels"),
        ({"max_shift": -1e9}, "leaves no noise levels"),
    ],
    ids=str,
)
def test_dynamic_shifts_that_are_no_numbers_are_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError, match=words):
        image_shift({**DYNAMIC, **changes}, 4096)


ODD = (None, True, "x", "9" * 5000, [], {}, [1.5], -1, 0, 0.5, 10**30, 10**400, 1e308, math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("key", sorted({*STATIC, *QWEN, "time_shift_type", "use_karras_sigmas", "stochastic_sampling"}))
@pytest.mark.parametrize("config", [STATIC, QWEN], ids=["static", "dynamic"])
def test_odd_values_are_refused_in_one_line_or_give_a_path(config, key):
    said = []
    for value in ODD:
        changed = {**config, key: value}
        try:
            path = flow_schedule(changed, 5, NATIVE, shift=image_shift(changed, 4096))
        except ConfigError as error:
            said.append(str(error))
        else:
            levels = [step.sigma for step in path]
            assert levels == sorted(levels, reverse=True)
            assert 0 < levels[-1] < levels[0] <= 1
    assert bool(said) != (config is QWEN and key == "shift")  # which is not read
    assert all(len(line) < 300 and "\n" not in line for line in said)


def test_too_many_and_too_few_steps():
    with pytest.raises(ConfigError, match="steps: 1001 is more than the 1000 steps"):
        flow_schedule(STATIC, 1001, NATIVE)
    with pytest.raises(ConfigError, match="shift_terminal needs at least 2; use more"):
        flow_schedule(QWEN, 1, NATIVE, shift=2.0)
    assert len(flow_schedule(STATIC, 1000, NATIVE)) == 1000


# -------------------------------------------------------------------------------------------------------- steps


def model(z, t):
    """A stand-in for a network that depends on the latent and on time."""
    return torch.sin(3 * z) * 0.5 + z * (t / 2000)


def run(stepper, path, z, noise=never):
    for step in path:
        x0, eps = step.split(z, model(z, step.t))
        z = stepper(z, x0, eps, step, noise)
    return z


def start():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("stepper", [ddim_keep, ddim_implied])
@pytest.mark.parametrize("config", [STATIC, {**STATIC, "shift": 1.0}], ids=["shift 3", "shift 1"])
def test_ddim_is_the_step_of_the_flow_matching_scheduler(stepper, config):
    path, scheduler = flow_schedule(config, 28, NATIVE), scheduler_of(config, 28)
    expected = start()
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, float(t)), t, expected).prev_sample
    torch.testing.assert_close(run(stepper, path, start()), expected, atol=2e-6, rtol=2e-6)


def test_a_velocity_is_split_into_what_it_was_made_of():
    step = flow_schedule(STATIC, 20, NATIVE)[7]
    x0, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64).unbind(0)
    z = step.noised(x0, eps)
    for found, made in zip(step.split(z, eps - x0), (x0, eps)):
        torch.testing.assert_close(found, made)


@pytest.mark.parametrize("index", [1, 9, 17])
@pytest.mark.parametrize("stepper", [posterior, ddim_ancestral])
def test_stochastic_steps_keep_the_marginal(index, stepper):
    step = flow_schedule(STATIC, 20, NATIVE)[index]
    torch.manual_seed(0)
    x0 = torch.full((1, 1, 500, 500), 0.7)
    eps = torch.randn_like(x0)
    z = step.noised(x0, eps)
    drawn = stepper(z, x0, eps, step, lambda: torch.randn_like(x0))
    assert drawn.mean().item() == pytest.approx(step.alpha_next * 0.7, abs=0.01)
    assert drawn.std().item() == pytest.approx(step.sigma_next, rel=0.01)


@pytest.mark.parametrize("index", [1, 9, 17])
def test_the_posterior_is_what_bayes_says(index):
    """z' given z, of draws of the chain from z' to z: by regression."""
    step = flow_schedule(STATIC, 20, NATIVE)[index]
    generator, x0 = torch.Generator().manual_seed(index), 0.7
    later, fresh = torch.randn(2, 400_000, dtype=torch.float64, generator=generator).unbind(0)
    z_next = step.alpha_next * x0 + step.sigma_next * later
    ratio = step.alpha / step.alpha_next
    z = ratio * z_next + (step.sigma**2 - ratio**2 * step.sigma_next**2) ** 0.5 * fresh
    assert z.std().item() == pytest.approx(step.sigma, rel=0.01)
    centred = z - z.mean()
    slope = float((centred * z_next).mean() / (centred * centred).mean())
    rest = z_next - z_next.mean() - slope * centred

    def mean_at(value):
        there = torch.full((1, 1, 1, 1), value, dtype=torch.float64)
        return posterior(there, torch.full_like(there, x0), there, step, lambda: torch.zeros_like(there)).item()

    def deviation():
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        return posterior(zero, zero, zero, step, lambda: torch.ones_like(zero)).item()

    assert mean_at(1.0) - mean_at(0.0) == pytest.approx(slope, rel=0.01)
    middle = float(z.mean())
    assert mean_at(middle) == pytest.approx(float(z_next.mean()), abs=0.01)
    assert deviation() == pytest.approx(rest.std().item(), rel=0.01)


def test_posterior_and_ancestral_are_one_if_x0_was_not_edited():
    z = start().double()
    for step in flow_schedule(STATIC, 20, NATIVE):
        noise = torch.randn_like(z)
        x0, eps = step.split(z, model(z, step.t))
        next_z = posterior(z, x0, eps, step, noise.clone)
        torch.testing.assert_close(next_z, ddim_ancestral(z, x0, eps, step, noise.clone))
        z = next_z
    assert step.sigma_next == 0
    torch.testing.assert_close(z, x0)


@pytest.mark.parametrize("stepper", [posterior, ddim_ancestral])
def test_without_signal_all_noise_is_drawn_anew(stepper):
    step = flow_schedule(STATIC, 20, NATIVE)[0]
    z, x0, noise = torch.randn(3, 1, 4, 8, 8).unbind(0)
    torch.testing.assert_close(stepper(z, x0, z, step, lambda: noise), step.alpha_next * x0 + step.sigma_next * noise)


def test_variance_preserving_steps_have_the_same_bits_as_before_there_were_others():
    torch.manual_seed(1)
    z, x0, eps, noise = torch.randn(4, 1, 4, 8, 8).unbind(0)
    for config in ({}, {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}):
        for step in make_schedule({"_class_name": "EulerDiscreteScheduler", **BETAS, **config}, 25)[:-1]:
            alpha = step.alpha**2 / step.alpha_next**2
            beta, variance = 1 - alpha, step.sigma**2
            mean = step.alpha_next * beta / variance * x0 + alpha**0.5 * step.sigma_next**2 / variance * z
            drawn = mean + (beta * step.sigma_next**2 / variance) ** 0.5 * noise
            assert torch.equal(posterior(z, x0, eps, step, lambda: noise), drawn)
            spread = (1 - alpha) * step.sigma_next**2 / step.sigma**2
            drawn = step.alpha_next * x0 + (step.sigma_next**2 - spread) ** 0.5 * eps + spread**0.5 * noise
            assert torch.equal(ddim_ancestral(z, x0, eps, step, lambda: noise), drawn)


@pytest.mark.parametrize("count", [8, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("pure", [False, True], ids=["from its first level", "from pure noise"])
def test_dpmpp_2m_equals_diffusers_solver(count, shift, pure):
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(count)
    if pure:  # its own first level is 0.999, or a little more after the shift
        scheduler.sigmas[0] = 1.0
    path = flow_path([float(level) for level in scheduler.sigmas])
    assert (path[0].alpha == 0) == pure
    expected, before = start(), start()
    for number, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(model(expected, path[number].t), t, expected).prev_sample
        if number == 0:
            torch.testing.assert_close(run(make_stepper("dpmpp_2m"), path[:1], before), expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(run(make_stepper("dpmpp_2m"), path, before), expected, atol=2e-6, rtol=2e-6)


def test_the_first_and_the_last_step_of_dpmpp_2m_are_those_of_first_order():
    path = flow_schedule(STATIC, 10, NATIVE)
    z, x0, other = torch.randn(3, 1, 4, 8, 8).unbind(0)
    for step in path:  # a pass may begin anywhere
        torch.testing.assert_close(
            make_stepper("dpmpp_2m")(z, x0, x0, step, never), ddim_implied(z, x0, x0, step, never), atol=1e-5, rtol=1e-5
        )
    stepper = make_stepper("dpmpp_2m")
    found = [stepper(z, x, x, step, never) for step, x in zip(path, itertools.cycle((x0, other)))]
    first_order = [ddim_implied(z, x, x, step, never) for step, x in zip(path, itertools.cycle((x0, other)))]
    far = [float((a - b).abs().max()) > 1e-3 for a, b in zip(found, first_order)]
    assert far == [False, False, *[True] * 7, False]


# ------------------------------------------------------------------------------------- settings and noise levels


def at(sigma):
    """A flow step at a noise level."""
    return Step(3, 20, 1000 * sigma, 1 - sigma, sigma, 1, 0, prediction_type="flow")


@pytest.mark.parametrize(
    ("fraction", "sigma", "places"),
    [
        (0.30, 0.756, {1: 0.24, 2.2: 0.42, 3.16: 0.51, 6: 0.66}),
        (0.45, 0.642, {1: 0.36, 2.2: 0.55, 3.16: 0.64, 6: 0.77}),
        (0.60, 0.522, {1: 0.48, 2.2: 0.67, 3.16: 0.74, 6: 0.85}),
        (0.70, 0.438, {1: 0.56, 2.2: 0.74, 3.16: 0.80, 6: 0.89}),
    ],
)
def test_a_fraction_of_the_path_is_the_noise_level_that_it_is_on_sdxls(fraction, sigma, places):
    assert at(sigma).done == pytest.approx(fraction, abs=2e-3)
    for shift, place in places.items():
        path = flow_schedule(STATIC, 1000, Timing(1, shift=shift))
        first = course_of(path, guided=True).first(fraction)
        assert first / 1000 == pytest.approx(place, abs=6e-3)
        assert path[first].done >= fraction > path[first - 1].done
        assert path[first].sigma - 1e-3 < sigma < path[first - 1].sigma + 1e-3


@pytest.mark.parametrize(
    ("sigma", "t", "cosine"),
    [
        (0.9, 914, 0.982),
        (0.8, 744, 0.847),
        (0.7, 606, 0.663),
        (0.6, 477, 0.464),
        (0.5, 354, 0.279),
        (0.4, 239, 0.134),
        (0.3, 138, 0.046),
        (0.2, 60, 0.009),
        (0.1, 13, 0.000),
    ],
)
def test_the_cosine_is_that_of_sdxls_timestep_with_the_noise_level(sigma, t, cosine):
    assert at(sigma).done == pytest.approx((981 - t) / 1000, abs=1.1e-3)
    assert at(sigma).cosine == pytest.approx(cosine, abs=1.1e-3)


def test_the_ends_of_the_path():
    assert at(1.0).done == 0
    assert 0.99999 < at(1.0).cosine < 1  # no part of a method is left out
    assert at(1e-6).done == pytest.approx(0.981)
    assert at(1e-6).cosine == pytest.approx(0, abs=1e-6)
    path = flow_schedule(STATIC, 20, NATIVE)
    course = course_of(path, guided=False)
    assert course.first(0.0) == 0
    assert course.first(0.999) == 19
    assert list(course.done) == sorted(course.done)
    assert course_of(path[:1], guided=True).first(0.9) == 0


def test_even_paths_are_counted_in_steps():
    path = make_schedule({"_class_name": "EulerDiscreteScheduler", **BETAS}, 50)
    course = course_of(path, guided=True)
    assert [course.first(fraction) for fraction in (0, 0.3, 0.6, 0.99, 1)] == [0, 15, 30, 49, 49]


# ------------------------------------------------------------------------------------------------------- canvas


class Neighbours:
    """A stand-in network whose prediction at a place depends on its neighbours, on time and on the text."""

    dtype = torch.float32

    def __call__(self, sample, timestep, *, return_dict, encoder_hidden_states, added_cond_kwargs):
        assert timestep.dtype == torch.float32
        around = torch.nn.functional.avg_pool2d(sample, 3, 1, 1, count_include_pad=False)
        text = encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return (torch.sin(2 * around) - sample * timestep / 3000 + text,)


GRID = Grid(32, 32, 16, 8)


def conditions(order=None):
    """Nine texts for nine views."""
    states = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(5))
    text = TextEmbeddings(states, torch.zeros(9, 0), torch.arange(9))
    whole = Conditions(text, None, torch.zeros(9, 6))
    return whole if order is None else whole.take(order)


def drawn(path, z, *, stepper=ddim_implied, hooks=(), views=None, of=None):
    models = with_base(plain(), denoiser=Neighbours())
    group = ViewGroup(always(views or Fuser(GRID, "linear"), of or conditions()), ClassifierFree(1.0))
    return denoise(models, Composition((group,), stepper, x0_hooks=hooks), path, z, never, view_batch=4)


def canvas(seed=0):
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_fusing_predictions_and_stepping_once_is_stepping_every_view_and_fusing():
    assert len(GRID) == 9
    path, fuser, network, texts = flow_schedule(STATIC, 12, NATIVE), Fuser(GRID, "linear"), Neighbours(), conditions()
    for name in ("ddim_keep", "ddim_implied"):
        z = canvas()
        for step in path:
            views = fuser.cut(z)
            (output,) = network(
                views,
                torch.tensor(step.t),
                return_dict=False,
                encoder_hidden_states=texts.text.states,
                added_cond_kwargs={},
            )
            z = fuser.fuse(STEPPERS[name](views, *step.split(views, output), step, never))
        torch.testing.assert_close(drawn(path, canvas(), stepper=STEPPERS[name]), z, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["ddim_implied", "dpmpp_2m"])
def test_a_swap_of_all_frequencies_at_every_step_returns_the_reference(name):
    reference = canvas(3)
    found = drawn(
        flow_schedule(STATIC, 12, NATIVE),
        canvas(),
        stepper=make_stepper(name),
        hooks=(lambda x0, step: x0 + (reference - x0),),
    )
    torch.testing.assert_close(found, reference, atol=5e-7, rtol=5e-7)


def test_permuting_the_views_permutes_their_predictions():
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    fuser = Fuser(GRID, "linear")

    def cut(z):
        return fuser.cut(z)[order]

    def fuse(views):
        return fuser.fuse(views[order.argsort()])

    path = flow_schedule(STATIC, 6, NATIVE)
    mixed = drawn(path, canvas(), views=SimpleNamespace(cut=cut, fuse=fuse), of=conditions(order))
    assert torch.equal(mixed, drawn(path, canvas()))
    assert not torch.equal(drawn(path, canvas(), of=conditions(order)), mixed)
