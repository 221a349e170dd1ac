"""Paths through given timesteps, on each kind of base model."""

import pytest

from resmaster_stages.errors import ConfigError
from resmaster_stages.models.parts import Models
from resmaster_stages.models.schedule import Timing
from tests.tiny_models import tiny
from tests.tiny_pixart import make_pixart
from tests.tiny_transformers import make_flux

GIVEN = (999, 749, 499, 249)


def test_a_unet_visits_the_given_timesteps():
    base = Models.from_pipeline(tiny()).base
    path = base.path(4, Timing(64, timesteps=GIVEN))
    assert [step.t for step in path] == list(GIVEN)
    assert path != base.path(4, Timing(64))
    with pytest.raises(ConfigError, match="must fall"):
        base.path(2, Timing(64, timesteps=(3, 900)))


def test_a_flow_path_has_a_thousandth_of_the_timesteps_as_noise_levels_and_no_time_shift():
    base = Models.from_pipeline(make_flux()).base
    path = base.path(4, Timing(64, timesteps=GIVEN))
    assert [step.sigma for step in path] == [0.999, 0.749, 0.499, 0.249]
    assert path[-1].sigma_next == 0
    with pytest.raises(ConfigError, match="must fall"):
        base.path(1, Timing(64, timesteps=(1000,)))


def test_pixart_visits_the_given_timesteps():
    path = Models.from_pipeline(make_pixart()).base.path(4, Timing(64, timesteps=GIVEN))
    assert [step.t for step in path] == list(GIVEN)
