"""The form of a build: which configuration its fields make, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_flows.build import build_dataset
from resmaster_flows.deployments import KINDS, ROLES, deployment_name, shards_beside
from resmaster_flows.form import ROOT, configuration, run_name
from resmaster_stages.config.load import load_config
from resmaster_stages.config.method import methods
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.errors import ConfigError, UserError
from tests.checkout import ROOT as CHECKOUT
from tests.fake_stages import config_at, planned

SHIPPED = CHECKOUT / "deployments" / "datasets"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The root that was deployed."""
    monkeypatch.setenv(ROOT, str(tmp_path / "deployed"))
    return str(tmp_path / "deployed")


def made(config: Any = "", advanced: str = "", **fields: Any) -> Any:
    return configuration(config, fields, advanced)


def test_a_form_that_is_left_as_it_is_makes_what_is_shipped(root: str) -> None:
    """Every shipped configuration, by its name and by its path."""
    untouched = {name: field["default"] for name, field in build_dataset.parameters.properties.items()}
    del untouched["config"], untouched["read_input"], untouched["advanced"]
    for path in sorted(SHIPPED.glob("*.yaml")):
        expected = load_config(path, root=root)
        assert configuration(path.stem, untouched) == expected
        assert configuration(str(path), untouched) == expected


def test_the_first_fields_change_what_they_name(root: str) -> None:
    found = made("sdxl-4k", name="mine", root="s3://b/p", input="/in/p.CSV", scale=2, limit=7, price=2.5)
    expected = load_config(SHIPPED / "sdxl-4k.yaml", name="mine", root="s3://b/p", prompts="/in/p.CSV", limit=7)
    assert found.upscale == expected.upscale.model_copy(update={"scale": 2.0})
    assert found.dispatch.price == 2.5
    assert (found.root, found.prompts, found.images, found.limit) == ("s3://b/p", "/in/p.CSV", None, 7)
    assert found.low_res == expected.low_res
    images = made("sdxl-4k", input="s3://photos/summer")
    assert (images.prompts, images.images, images.root) == (None, "s3://photos/summer", root)


def test_another_model_has_no_commit_and_variant_of_the_one_before() -> None:
    before, after = made("sdxl-4k"), made("sdxl-4k", model="me/finetune")
    assert before.model.revision is not None
    assert (after.model.id, after.model.revision, after.model.variant) == ("me/finetune", None, None)
    assert after.model.vae == before.model.vae
    assert made("sdxl-4k", model=before.model.id).model == before.model


@pytest.mark.parametrize("name", [name for name, method in methods().items() if "faithful" in method.presets])
def test_a_preset_is_the_preset_whatever_the_configuration_says(name: str, tmp_path: Path) -> None:
    """Also of a dataset, whose configuration has a value for every field."""
    clean = made(config_at(tmp_path).model_dump(exclude={"upscale"}), method=name, preset="faithful").upscale
    url = planned(tmp_path, ["a"], tmp_path).url
    values = {"name": "d", "upscale": {"method": "resmaster", "steps": 3, "preset": "exact"}}
    for source in (url, values, f"{url}/config.json"):
        found = made(source, method=name, preset="faithful", scale=clean.scale).upscale
        assert found.preset == "faithful"
        for field in methods()[name].presets["faithful"]:
            assert getattr(found, field) == getattr(clean, field), field


def test_a_dataset_is_the_beginning_of_another(tmp_path: Path) -> None:
    first = planned(tmp_path / "out", ["a"], tmp_path, samples_per_shard=1)
    again = made(first.url)
    assert again == open_dataset(first.url).config, "root and name too: the same form goes on with it"
    other = made(f"{first.url}/", name="other", advanced="low_res: {steps: 7}\nseed: 3")
    assert (other.name, other.seed, other.low_res.steps) == ("other", 3, 7)
    assert other.low_res.height == again.low_res.height
    assert other.root == again.root


def test_a_file_names_what_lies_beside_it(tmp_path: Path, root: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.yaml").write_text(yaml.safe_dump({"name": "x", "prompts": "../p.txt", "root": "elsewhere"}))
    found = made(str(tmp_path / "in" / "x.yaml"))
    assert (found.prompts, found.root) == (str(tmp_path / "p.txt"), root), "a relative root is nobody's"
    assert made(f"file://{tmp_path}/in/x.yaml") == found


def test_a_whole_configuration_stays_as_it_is(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    assert made(config) is config
    assert made(config.model_dump(mode="json")) == config


def test_the_last_word_has_advanced() -> None:
    found = made("picturebook", method="cascade", advanced="upscale: {scale: 3, method: resmaster}\nimage_format: webp")
    assert (found.upscale.method, found.upscale.scale, found.image_format) == ("resmaster", 3.0, "webp")
    assert found.upscale.steps == 14, "what the configuration says of the method"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a shipped name": ({"config": "sdxl-4"}, "config: no shipped configuration 'sdxl-4' (did you mean 'sdxl-4k'?)"),
    "a file": ({"config": "/nowhere/x.yaml"}, "config: /nowhere/x.yaml: no such file; the worker of the build must"),
    "a dataset": ({"config": "/nowhere/x"}, "/nowhere/x: no dataset here (no config.json)"),
    "no name": ({"input": "/x.txt"}, "form: name: Field required"),
    "input": ({"config": "picturebook", "input": "p.txt"}, "input: p.txt is relative to nothing here; give a whole"),
    "method": ({"config": "picturebook", "method": "casade"}, "unknown method 'casade' (did you mean 'cascade'?)"),
    "preset": ({"config": "picturebook", "preset": "frecas"}, "method resmaster: unknown preset 'frecas'; known: def"),
    "scale": ({"config": "picturebook", "scale": "big"}, "upscale.scale: Input should be a valid number"),
    "price": ({"config": "picturebook", "price": -1}, "dispatch.price: Input should be greater than or equal to 0"),
    "no YAML": ({"config": "picturebook", "advanced": "a: ["}, "advanced: not valid YAML"),
    "no keys": ({"config": "picturebook", "advanced": "steps"}, "advanced: write keys and values of a configuration"),
    "a key": ({"config": "picturebook", "advanced": "sead: 1"}, "unknown key 'sead' (did you mean 'seed'?)"),
    "a number": ({"config": 3}, "config: is 3; give a name, a file, a URL, or a mapping"),
}


@pytest.mark.parametrize(("parameters", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        build_dataset.fn(**parameters)
    (line,) = str(found.value).splitlines()
    assert said in line


def test_a_relative_root_needs_a_deployed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT)
    with pytest.raises(UserError, match=r"^root: out is relative to nothing here; give a whole path or s3://"):
        made("picturebook")
    assert made("picturebook", root="/data").root == "/data"


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    for content, said in ((b"\xff\xfe", "not a text file"), (b"- a", "holds no keys"), (b"a" * 2**21, "bytes")):
        (tmp_path / "x.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            made(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"config": "sdxl-4k"}, "sdxl-4k"),
        ({"config": "s3://b/p/old/", "name": ""}, "old"),
        ({"config": "s3://b/p/old/config.json"}, "old"),
        ({"config": "/x/mine.yaml"}, "mine"),
        ({"config": "sdxl-4k", "name": "mine"}, "mine"),
        ({"config": {"name": "whole"}}, "whole"),
        ({"config": config_at(Path("/x"))}, "demo"),
        ({}, "a dataset"),
    ],
)
def test_a_run_is_called_like_its_dataset(parameters: dict[str, Any], name: str) -> None:
    assert run_name(parameters) == name


def test_the_shards_of_a_build_go_to_the_pool_of_the_build() -> None:
    names = {deployment_name(flow, kind) for flow in ROLES for kind in KINDS}
    assert len(names) == len(ROLES) * len(KINDS)
    for kind in KINDS:
        for flow in ROLES:
            assert shards_beside(deployment_name(flow, kind)) == deployment_name("process-shards", kind)
    assert {shards_beside(name) for name in (None, "mine", "resmaster-build-mine")} == {"resmaster-shards"}
