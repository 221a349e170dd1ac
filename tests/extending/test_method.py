"""A method from outside: one class, given to `register`, and everything knows it."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import Method, methods, register
from resmaster_stages.dataset.stages import hashes_of, stages_of
from resmaster_stages.diffusion.cost import UnetWork, counting
from resmaster_stages.diffusion.loop import Composition
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import ConfigError
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.methods.direct import whole_canvas_composition
from resmaster_stages.methods.request import Request
from resmaster_stages.methods.settings import FromNoise, LateGuidance, area
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights
from resmaster_stages.models.schedule import Course
from resmaster_stages.planning.workload import Denoising, high_res_work
from tests.methods.common import adapted, some_image


class Tinted(FromNoise, LateGuidance):
    """The whole canvas, tinted: what a newcomer writes on the first afternoon."""

    presets: ClassVar = {"default": {}, "faithful": {"tint": 1.0, "steps": 3}}

    method: Literal["tinted"] = "tinted"
    tint: float = Field(default=0.5, ge=0)
    """How much is added to every latent before each step."""

    def work(self, grid: Grid, course: Course) -> Iterator[UnetWork]:
        yield UnetWork(self.rows(self.left(self.start, course), course), area(grid.height, grid.width, grid))

    def compose(self, request: Request) -> Composition:
        return whole_canvas_composition(
            request, self.guidance(request.models), latent_hooks=(lambda z, step: z + self.tint * step.sigma,)
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.config.method._METHODS", dict(methods()))
    register(Tinted)


def config(**values: object) -> DatasetConfig:
    return parse_config({"name": "d", "upscale": {"method": "tinted", **values}})


def test_a_configuration_is_read_as_its_class() -> None:
    upscale = config(preset="faithful").upscale
    assert isinstance(upscale, Tinted)
    assert (upscale.tint, upscale.steps) == (1.0, 3)
    assert parse_config(config(tint=0.25).model_dump(mode="json")) == config(tint=0.25)
    with pytest.raises(ConfigError, match=r"unknown key 'upscale\.stride'; method tinted knows: .*, tint$"):
        config(stride=0.5)
    with pytest.raises(ConfigError, match=r"known: direct, .*, lanczos, tinted"):
        parse_config({"name": "d", "upscale": {"method": "magic"}})
    with pytest.raises(ValueError, match="there is a method 'tinted' already"):
        register(type("Other", (Tinted,), {"__doc__": "Another one."}))
    with pytest.raises(ValueError, match="Unnamed: has no name"):
        register(type("Unnamed", (FromNoise,), {}))


def test_it_is_in_the_schema_that_forms_are_made_of() -> None:
    alternatives = DatasetConfig.model_json_schema()["properties"]["upscale"]["anyOf"]
    own = next(each for each in alternatives if each["title"] == "tinted")
    assert own["properties"]["tint"]["description"].startswith("How much")
    assert own["properties"]["preset"]["enum"] == ["default", "faithful"]


@pytest.mark.parametrize("command", ["upscale", "compare"])
def test_help_lists_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "tinted" in capsys.readouterr().out


def test_it_is_compared_with_others() -> None:
    base = parse_config({"name": "d", "upscale": {"steps": 7, "stride": 0.75}})
    (variant,) = variants(base, "tinted:tint=0.1", "2x2")
    assert variant.config.upscale == Method.model_validate({"method": "tinted", "steps": 7, "tint": 0.1, "scale": 2.0})


def test_it_draws_and_its_work_is_foreseen() -> None:
    upscale = config(steps=2, scale=2, tint=0.0, view_batch=1).upscale
    with counting() as cost:
        plain = upscale_image(adapted(), some_image(), "a cat", config=upscale)
    work = high_res_work(config(steps=2, scale=2).upscale, Denoising(Geometry(64, 4)), 64, 64)
    assert sum(each.rows for each in work) == cost.rows == 4
    direct = Method.model_validate({"method": "direct", "steps": 2, "scale": 2})
    assert plain.tobytes() == upscale_image(adapted(), some_image(), "a cat", config=direct).tobytes()
    tinted = upscale_image(adapted(), some_image(), "a cat", config=config(steps=2, scale=2).upscale)
    assert tinted.tobytes() != plain.tobytes()


def test_its_fields_are_its_identity_and_what_it_reads_decides_the_stages() -> None:
    def hashed(**values: object) -> str:
        return hashes_of(config(**values), Weights("m"))["high_res"]

    assert hashed() != hashed(tint=0.1)
    assert hashed(view_batch=3) == hashed()
    assert stages_of(config()) == ("low_res", "high_res", "quality")
    assert not config().upscale.uses("reference")
    assert config(init="noised_lr").upscale.uses("reference")
    with pytest.raises(ConfigError, match="only method freescale reads"):
        config().upscale.require_detail_mask("a test has")


def test_a_report_says_what_was_set() -> None:
    import pyarrow as pa

    from resmaster_stages.publish.report import SIZE_COLUMNS, facts

    found = facts(config(steps=7), pa.table({name: pa.array([], pa.int64()) for name in SIZE_COLUMNS}))
    assert (found["method"], found["steps"]) == ("tinted", 7)
