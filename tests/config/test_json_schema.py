"""The JSON schema for editors accepts every example and refuses what the configuration refuses."""

import json
from typing import Any

import jsonschema
import pytest
import yaml

from resmaster_flows.cli.main import main
from resmaster_stages.config.json_schema import json_schema
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import methods
from resmaster_stages.errors import ConfigError
from tests.checkout import ROOT

EXAMPLES = sorted((ROOT / "deployments" / "datasets").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_it_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Any) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


def test_every_method_has_its_own_keys() -> None:
    for name, method in methods().items():
        VALIDATOR.validate({"name": "x", "upscale": {"method": name, "scale": 2}})
        own = set(method.model_fields) - {"method", "preset", "scale", "colour_match"}
        if own:
            key = sorted(own)[0]
            found = [each for each in json_schema()["properties"]["upscale"]["anyOf"] if each.get("title") == name]
            assert key in found[0]["properties"], name


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": "p.txt"},
        {"name": "x", "promts": "p.txt"},
        {"name": "x", "low_res": {"stepz": 3}},
        {"name": "x", "low_res": {"steps": 0}},
        {"name": "x", "captions": {"source": "servr"}},
        {"name": "x", "upscale": {"steps": "many"}},
        {"name": "x", "upscale": {"method": "resmastr"}},
        {"name": "x", "upscale": {"cosine_scale_1": 3}},
        {"name": "x", "upscale": {"method": "lanczos", "steps": 3}},
        {"name": "x", "upscale": {"structure": {"preset": "papr"}}},
        {"name": "x", "upscale": {"preset": "faithfull"}},
        {"name": "x", "model": {"ip_adapter": {"id": "a/b"}}},
    ],
    ids=str,
)
def test_what_is_a_mistake_is_one_in_an_editor_too(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(values)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(values)


def test_keys_have_descriptions() -> None:
    schema = json_schema()
    for name, value in schema["properties"].items():
        assert value.get("description"), name
    for part, definition in schema["$defs"].items():
        for name, value in definition["properties"].items():
            assert value.get("description"), f"{part}.{name}"
