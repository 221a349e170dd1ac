import dataclasses
import itertools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.diffusion.fusing import WEIGHTS, Fuser
from resmaster_stages.diffusion.steppers import (
    STEPPERS,
    ddim_ancestral,
    ddim_implied,
    ddim_keep,
    make_stepper,
    posterior,
    renoise,
)
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.schedule import Step, flow_level, make_schedule, noisier, require_path, sdxl_timestep
from tests.tiny_models import SCHEDULER


def euler_config(**changes):
    return {"_class_name": "EulerDiscreteScheduler", **SCHEDULER, **changes}


def never():
    raise AssertionError("this stepper must not draw noise")


def model(z, t):
    """A stand-in for the UNet that depends on position, latent and time."""
    return torch.sin(3 * z) * 0.5 + z * (t / 2000)


def run(stepper, schedule, z):
    for step in schedule:
        x0, eps = step.split(z, model(z, step.t))
        z = stepper(z, x0, eps, step, never)
    return z


def test_fifty_leading_steps_are_those_of_sdxl():
    schedule = make_schedule(euler_config(), 50)
    assert [step.t for step in schedule][:3] == [981, 961, 941]
    assert schedule[-1].t == 1
    assert schedule[0].alpha ** 2 == pytest.approx(0.0058, abs=5e-5)
    assert schedule[25].alpha ** 2 == pytest.approx(0.302, abs=5e-4)
    assert (schedule[-1].alpha_next, schedule[-1].sigma_next) == (1.0, 0.0)
    assert all(a.alpha_next == b.alpha for a, b in itertools.pairwise(schedule))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 7, 20, 50, 999, 1000])
def test_timesteps_are_those_of_diffusers(spacing, count):
    scheduler = DDIMScheduler(**{**SCHEDULER, "timestep_spacing": spacing})
    scheduler.set_timesteps(count)
    chosen = [step.t for step in make_schedule({"_class_name": "DDIMScheduler", **scheduler.config}, count)]
    assert chosen == scheduler.timesteps.clamp(max=999).tolist()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [1, 7, 10, 20, 25, 50, 200, 999])
def test_timesteps_of_dpm_solvers_are_those_of_diffusers(kind, spacing, count):
    scheduler = kind(**{**SCHEDULER, "timestep_spacing": spacing})
    scheduler.set_timesteps(count)
    chosen = [step.t for step in make_schedule({"_class_name": kind.__name__, **scheduler.config}, count)]
    # with `trailing`, rounding gives diffusers one step too many at 999
    assert chosen == scheduler.timesteps[:count].clamp(max=999).tolist()


@pytest.mark.parametrize("count", [1, 10, 25])
def test_dpm_solvers_leave_out_the_end_of_their_spacing(count):
    """PixArt's configuration names no spacing."""
    config = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    for kind in (DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler):
        scheduler = kind(**config)
        scheduler.set_timesteps(count)
        chosen = [step.t for step in make_schedule({"_class_name": kind.__name__, **config}, count)]
        assert chosen == scheduler.timesteps.tolist()
    if count == 10:
        assert (chosen[0], chosen[1], chosen[-1]) == (999, 899, 100)


@pytest.mark.parametrize("stepper", [ddim_keep, ddim_implied])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_fifty_steps_equal_diffusers_ddim(stepper, prediction_type, set_alpha_to_one):
    scheduler = DDIMScheduler(
        **SCHEDULER, prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, clip_sample=False
    )
    scheduler.set_timesteps(50)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = start
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, int(t)), t, expected).prev_sample
    ours = run(stepper, make_schedule({"_class_name": "DDIMScheduler", **scheduler.config}, 50), start)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


def test_fifty_steps_equal_diffusers_euler_in_its_own_units():
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(50)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(expected, t)
        expected = scheduler.step(model(scaled, int(t)), t, expected).prev_sample
    ours = run(ddim_keep, make_schedule({"_class_name": "EulerDiscreteScheduler", **scheduler.config}, 50), start)
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)


@settings(max_examples=25)
@given(
    st.integers(4, 20),
    st.integers(4, 20),
    st.integers(2, 9),
    st.integers(0, 19),
    st.sampled_from(WEIGHTS),
    st.sampled_from(["ddim_keep", "ddim_implied"]),
    st.data(),
)
def test_fuse_then_step_equals_step_then_fuse(height, width, window, index, kind, name, data):
    grid = Grid(height, width, window, data.draw(st.integers(1, window)))
    fuser, step, stepper = Fuser(grid, kind), make_schedule(euler_config(), 20)[index], STEPPERS[name]
    generator = torch.Generator().manual_seed(height * 100 + width)
    z = torch.randn(1, 4, height, width, generator=generator)
    views = fuser.cut(z)
    outputs = torch.randn(views.shape, generator=generator)
    fused = stepper(z, *step.split(z, fuser.fuse(outputs)), step, never)
    stepped = fuser.fuse(stepper(views, *step.split(views, outputs), step, never))
    torch.testing.assert_close(fused, stepped, atol=1e-5, rtol=1e-5)


def test_a_path_through_given_timesteps_has_their_noise_levels_and_ends_clean():
    every = {step.t: step for step in make_schedule(euler_config(timestep_spacing="trailing"), 1000)}
    path = make_schedule(euler_config(), 4, (999, 749, 499, 249))
    assert [step.t for step in path] == [999, 749, 499, 249]
    assert [step.alpha for step in path] == [every[t].alpha for t in (999, 749, 499, 249)]
    assert all(a.alpha_next == b.alpha and a.sigma_next == b.sigma for a, b in itertools.pairwise(path))
    assert (path[-1].alpha_next, path[-1].sigma_next) == (1.0, 0.0)
    assert [(step.index, step.count) for step in path] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    keeps = {**SCHEDULER, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    assert make_schedule(keeps, 1, (399,))[0].alpha_next == 1.0
    for wrong in ((249, 499), (499, 499), (1000, 3), (3, -1)):
        with pytest.raises(ConfigError, match="must fall and be from 0 to 999"):
            make_schedule(euler_config(), 2, wrong)


@pytest.mark.parametrize(("timestep", "ratio"), [(200, 0.5**1.5), (400, 0.25), (200, 0.25), (281, 1.0), (998, 0.1)])
def test_a_noisier_timestep_has_a_fraction_of_the_signal_to_noise_ratio(timestep, ratio):
    """By diffusers' products of SDXL's schedule."""
    products = DDIMScheduler.from_config({**SCHEDULER, "_class_name": "DDIMScheduler"}).alphas_cumprod.double()
    signal = products / (1 - products)
    below = (signal <= ratio * signal[timestep] * (1 + 1e-9)).nonzero()
    assert noisier(timestep, ratio) == (int(below[0]) if len(below) else 999)


def test_a_flow_level_has_the_signal_to_noise_ratio_of_sdxls_timestep():
    for timestep in (0, 1, 343, 500, 999):
        sigma = flow_level(timestep)
        assert sdxl_timestep(1 - sigma, sigma) == pytest.approx(timestep, abs=1e-6)
    # FreCaS has for flow models t' = s t / (1 + (s - 1) t) with s the root of the ratio of sizes
    sigma, s = flow_level(400), 2**0.5
    assert flow_level(noisier(400, 1 / 2)) == pytest.approx(s * sigma / (1 + (s - 1) * sigma), abs=1e-3)


def test_a_truncated_path_hands_over_x0():
    step = make_schedule(euler_config(), 20)[7]
    last = dataclasses.replace(step, alpha_next=1.0, sigma_next=0.0)
    z, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0, eps = last.split(z, output)
    for name in STEPPERS:
        torch.testing.assert_close(STEPPERS[name](z, x0, eps, last, never), x0)


def test_a_step_from_clean_latents_inverts():
    """One step up with the predicted noise, and one step down with the same prediction, gives the latents back."""
    down = make_schedule(euler_config(), 1, (249,))[0]
    up = dataclasses.replace(down, t=0, alpha=1.0, sigma=0.0, alpha_next=down.alpha, sigma_next=down.sigma)
    clean, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    z = ddim_keep(clean, *up.split(clean, output), up, never)
    torch.testing.assert_close(z, down.alpha * clean + down.sigma * output)
    torch.testing.assert_close(ddim_keep(z, *down.split(z, output), down, never), clean, atol=1e-5, rtol=1e-5)


def test_renoise_draws_all_noise_anew():
    step = make_schedule(euler_config(), 4, (999, 749, 499, 249))[1]
    z, x0, eps, fresh = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    expected = step.alpha_next * x0 + step.sigma_next * fresh
    assert torch.equal(renoise(z, x0, eps, step, lambda: fresh), expected)


def test_posterior_noise_per_view_would_lose_variance_where_views_overlap():
    grid = Grid(4000, 8, 8, 4)  # interior rows are covered twice
    fuser, step = Fuser(grid, "uniform"), make_schedule(euler_config(), 20)[10]
    torch.manual_seed(0)
    z = torch.zeros(1, 1, 4000, 8)
    views = fuser.cut(z)
    on_canvas = posterior(z, z, z, step, lambda: torch.randn_like(z))
    per_view = fuser.fuse(posterior(views, views, views, step, lambda: torch.randn_like(views)))
    alpha = step.alpha**2 / step.alpha_next**2
    variance = (1 - alpha) * step.sigma_next**2 / step.sigma**2
    assert on_canvas[:, :, 8:-8].var().item() == pytest.approx(variance, rel=0.03)
    assert per_view[:, :, 8:-8].var().item() == pytest.approx(variance / 2, rel=0.03)


def test_posterior_keeps_the_marginal_and_ends_at_x0():
    schedule = make_schedule(euler_config(), 20)
    step = schedule[5]
    torch.manual_seed(0)
    x0 = torch.full((1, 1, 300, 300), 0.7)
    z = step.alpha * x0 + step.sigma * torch.randn_like(x0)
    drawn = posterior(z, x0, z, step, lambda: torch.randn_like(x0))
    assert drawn.mean().item() == pytest.approx(step.alpha_next * 0.7, abs=0.01)
    assert drawn.std().item() == pytest.approx(step.sigma_next, rel=0.01)
    torch.testing.assert_close(posterior(z, x0, z, schedule[-1], never), x0, atol=1e-5, rtol=1e-5)


def test_an_edited_x0_tells_the_steppers_apart():
    step = make_schedule(euler_config(), 20)[5]
    z, x0, eps = torch.randn(3, 1, 4, 8, 8).unbind(0)
    assert not torch.allclose(ddim_keep(z, x0, eps, step, never), ddim_implied(z, x0, eps, step, never), atol=1e-2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}, "no betas"),
        (euler_config(prediction_type="sample"), "epsilon or v_prediction"),
        (euler_config(timestep_spacing="random"), "leading, trailing or linspace"),
        (euler_config(num_train_timesteps=10), "use fewer"),
        (euler_config(num_train_timesteps=20, _class_name="DPMSolverMultistepScheduler"), "more than the 19 steps"),
        (euler_config(use_flow_sigmas=True), "use_flow_sigmas goes with no epsilon prediction; set it to false"),
        (euler_config(prediction_type="flow_prediction", use_flow_sigmas=True), "epsilon or v_prediction"),
        (euler_config(steps_offset="one"), "steps_offset is no whole number up to 100000; download"),
        (euler_config(steps_offset=None), "steps_offset is no whole number up to 100000; download"),
        (euler_config(steps_offset=float("inf")), "steps_offset is no whole number up to 100000; download"),
        (euler_config(num_train_timesteps=10**9), "num_train_timesteps is 1000000000 and must be from 1 to 100000"),
        (euler_config(num_train_timesteps=-1), "num_train_timesteps is -1 and must be from 1"),
        (euler_config(beta_start=None), "its betas .* describe no path"),
        (euler_config(beta_end="x"), "its betas .* describe no path"),
        (euler_config(beta_end=10**9), "its betas .* describe no path"),
        (euler_config(beta_end=float("nan")), "its betas .* describe no path"),
        (euler_config(beta_schedule="x"), "its betas .* describe no path"),
        (euler_config(trained_betas=[]), "its betas .* describe no path"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        make_schedule(config, 20)


ODD = (None, True, "x", "9" * 5000, [], {}, [1.5], -1, 0, 0.5, 10**30, 10**400, 1e308, math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("key", ["num_train_timesteps", "timestep_spacing", "steps_offset", "prediction_type"])
def test_odd_values_of_a_scheduler_are_refused_in_one_line_or_give_a_path(key):
    said = []
    for value in ODD:
        try:
            require_path(euler_config(**{key: value}), 5)
        except ConfigError as error:
            said.append(str(error))
        else:
            assert len(make_schedule(euler_config(**{key: value}), 5)) == 5
    assert said
    assert all(len(line) < 300 and "\n" not in line for line in said)


def test_zero_terminal_snr_starts_without_division_by_zero():
    config = euler_config(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    out = run(ddim_implied, make_schedule(config, 10), torch.randn(1, 4, 8, 8))
    assert torch.isfinite(out).all()


def test_ancestral_steps_equal_diffusers_ddim_with_eta_1_and_the_posterior():
    scheduler = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    z = theirs = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for step in make_schedule({"_class_name": "DDIMScheduler", **scheduler.config}, 20):
        noise = torch.randn_like(z)
        x0, eps = step.split(z, model(z, step.t))
        expected = scheduler.step(model(theirs, step.t), step.t, theirs, eta=1.0, variance_noise=noise).prev_sample
        torch.testing.assert_close(
            posterior(z, x0, eps, step, noise.clone), ddim_ancestral(z, x0, eps, step, noise.clone)
        )
        z, theirs = ddim_ancestral(z, x0, eps, step, noise.clone), expected
        torch.testing.assert_close(z, theirs, atol=1e-5, rtol=1e-5)
    step = make_schedule(euler_config(), 5)[-1]
    assert torch.equal(ddim_ancestral(z, z, z, step, never), z)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [8, 25])
def test_dpmpp_2m_equals_diffusers_solver(prediction_type, spacing, count):
    changes = {"prediction_type": prediction_type, "timestep_spacing": spacing}
    scheduler = DPMSolverMultistepScheduler(
        **{**SCHEDULER, **changes}, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    schedule = make_schedule(euler_config(**changes), count)
    scheduler.set_timesteps(timesteps=[step.t for step in schedule])
    scheduler.sigmas = torch.tensor([step.sigma / step.alpha for step in schedule] + [0.0], dtype=torch.float64)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = start
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, int(t)), t, expected).prev_sample
    # diffusers steps in float32
    torch.testing.assert_close(run(make_stepper("dpmpp_2m"), schedule, start), expected, atol=5e-6, rtol=5e-6)


def test_the_first_step_of_dpmpp_2m_is_ddim_and_so_is_every_first_step_of_a_pass():
    schedule = make_schedule(euler_config(), 10)
    z, x0 = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for step in schedule:  # a pass may begin anywhere
        torch.testing.assert_close(
            make_stepper("dpmpp_2m")(z, x0, x0, step, never), ddim_implied(z, x0, x0, step, never), atol=1e-5, rtol=1e-5
        )
    stepper = make_stepper("dpmpp_2m")
    stepper(z, x0, x0, schedule[0], never)
    assert (stepper(z, -x0, x0, schedule[1], never) - ddim_implied(z, -x0, x0, schedule[1], never)).abs().max() > 0.01


def test_a_timestep_that_is_visited_twice_does_not_stop_dpmpp_2m():
    """As the first one of 1000 steps with an offset of 1 is."""
    schedule = make_schedule(euler_config(), 1000)
    assert [step.t for step in schedule[:3]] == [999, 999, 998]
    assert torch.isfinite(run(make_stepper("dpmpp_2m"), schedule[:4], torch.randn(1, 4, 8, 8))).all()


def even(count, low=-4.0, high=3.0):
    """Steps that are even in l = log(alpha / sigma)."""
    lines = [low + (high - low) * i / count for i in range(count + 1)]
    signal = [1 / (1 + math.exp(-2 * line)) for line in lines]
    return [
        Step(i, count, 0, a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5)
        for i, (a, b) in enumerate(itertools.pairwise(signal))
    ]


def error(count, stepper, slope):
    """Of the end of a path of x0 = slope l + 0.1, against the closed integral of d(z / sigma) = x0 e^l dl."""
    steps, z = even(count), torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
    for step in steps:
        x0 = torch.full_like(z, slope * math.log(step.alpha / step.sigma) + 0.1)
        z = stepper(z, x0, x0, step, never)
    whole = [(slope * (line - 1) + 0.1) * math.exp(line) for line in (-4.0, 3.0)]
    exact = steps[-1].sigma_next * (0.3 / steps[0].sigma + whole[1] - whole[0])
    return abs(z.item() - exact)


def test_dpmpp_2m_is_of_second_order():
    assert error(20, make_stepper("dpmpp_2m"), 0.0) < 1e-12  # a constant x0: exact
    errors = {count: error(count, make_stepper("dpmpp_2m"), 0.2) for count in (20, 40, 80)}
    assert errors[20] < error(20, ddim_implied, 0.2) / 4
    assert errors[40] == pytest.approx(errors[20] / 4, rel=0.2)
    assert errors[80] == pytest.approx(errors[40] / 4, rel=0.1)
