"""Any value at any place of a configuration is refused in words, or survives all that planning does with it."""

import datetime
import json
import math
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resmaster_stages.config.load import LONGEST_TOLD, MOST_TOLD, load_config, parse_config
from resmaster_stages.config.part import LONGEST_PATH
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.planning.estimate import estimate
from resmaster_stages.planning.preview import preview
from tests.config.test_mistakes import PLACES

NUMBERS = (0, -1, 1, 2, 15, 16, 2**31 - 1, 2**31, 2**63, 2**64 - 1, 2**64, 10**30, -(10**30), 10**4000)
FLOATS = (0.5, -0.0, 1e308, -1e308, 5e-324, 1.0000001, 1e30, math.nan, math.inf, -math.inf)
TEXTS = (
    *(
        "",
        " ",
        "\n",
        "-",
        "--help",
        "0",
        "true",
        "null",
        ".",
        "..",
        "~",
        "~nobody",
        "/etc",
        "/dev/null",
        "a b",
        "%s",
        "{0}",
    ),
    *("a\0b", "\ud800", "\x1b[31m", "\u202e", "\ufeff", "é" * 200, "x" * 256, "x" * 100_000, "x/" * 3_000, "./" * 50),
    *("file:///etc/passwd", "http://", "http://a:b@c", "https://h/v1", "gs://b/c", "memory://x", "picturebook", "o/n"),
)
OTHERS = (None, True, False, b"x", [], {}, [[]], [1, 2], ["x"] * 5_000, {"preset": []}, {"preset": "paper"}, {1: 2})
BIG = (
    {"x" * 100_000: 1},
    {f"k{number}": number for number in range(5_000)},
    reduce(lambda inner, _: [inner], range(5_000), []),
    reduce(lambda inner, _: {"x": inner}, range(5_000), {}),
    datetime.date(2024, 1, 1),
)
VALUES = (*NUMBERS, *FLOATS, *TEXTS, *OTHERS, *BIG)
LONGEST_LINE = LONGEST_TOLD + 100


def with_value(path: tuple[str, ...], method: str, value: Any) -> dict[str, Any]:
    """A configuration with `value` at a path."""
    values: dict[str, Any] = {"name": "demo", "root": "out", "prompts": "p.txt", "upscale": {"method": method}}
    if path == ("images",):
        del values["prompts"]
    inner = values
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return values


def refusal(call: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """The lines with which a call refuses its arguments. There are none if it takes them."""
    try:
        call(*args)
    except UserError as error:
        return error.mistakes if isinstance(error, ConfigError) else (str(error),)
    return ()


def survives(path: tuple[str, ...], method: str, value: Any) -> bool:
    """Whether a configuration with `value` at a path is taken. Asserts that it is refused in words if not."""
    values = with_value(path, method, value)
    if said := refusal(parse_config, values, "my.yaml"):
        assert len(said) <= MOST_TOLD + 1
        assert all(line.startswith("my.yaml: ") and len(line) <= LONGEST_LINE for line in said)
        assert any(name in line for line in said for name in (path[0], path[-1]))
        return False
    config = parse_config(values)
    assert parse_config(json.loads(config.model_dump_json())) == config
    if said := refusal(preview, config):
        assert all("\n" not in line and len(line) < LONGEST_PATH + 1_500 for line in said)
        return False
    look = preview(config)
    assert len(look.headline()) < LONGEST_PATH + 1_500
    assert all(stage.samples >= 0 for stage in estimate(look, workers=3, price=1.5).stages)
    assert stage_hashes(config)
    return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one prompt in p.txt; the home folder is empty."""
    (tmp_path / "p.txt").write_text("a red house\n")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PLACES), st.sampled_from(VALUES))
def test_any_value_is_refused_in_words_or_survives_planning(
    folder: Path, where: tuple[tuple[str, ...], str], value: Any
) -> None:
    survives(*where, value)
    assert {path.name for path in folder.iterdir()} == {"p.txt", "home"}, "planning writes nothing"


def test_the_test_can_tell(folder: Path) -> None:
    assert survives(("seed",), "resmaster", 2**64 - 1)
    assert not survives(("seed",), "resmaster", 2**64)
    assert survives(("low_res", "height"), "resmaster", 256)
    assert not survives(("low_res", "height"), "resmaster", 2**31)
    assert not survives(("quality", "clip"), "resmaster", "/etc")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("root", "x" * 256, "a part of 256 bytes"),
        ("root", "é" * 128, "a part of 256 bytes"),
        ("root", "x/" * 2_000, "use at most 3,500"),
        ("root", f"s3://bucket/{'x/' * 400}", "use at most 700"),
        ("root", "", "cannot be empty"),
        ("prompts", "x" * 256, "a part of 256 bytes"),
        ("seed", 2**64, "less than or equal to 18446744073709551615"),
        ("limit", 10**30, "more than 64 bits"),
        ("quality", {"clip": ""}, "cannot be empty"),
        ("model", {"id": " "}, "cannot be empty"),
        ("captions", {"instruction": "x" * 10_001}, "use at most 10,000"),
        ("low_res", {"width": 100_000}, "less than or equal to 16384"),
        ("low_res", {"batch_size": 10**9}, "less than or equal to 10000"),
        ("upscale", {"via": [1.5] * 9}, "give at most 8"),
        ("upscale", {"structure": {"cutoff": 1e-300}}, "greater than or equal to 0.01"),
    ],
)
def test_limits_are_told_with_the_number(key: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "demo", key: value}, "my.yaml")
    (line,) = caught.value.mistakes
    assert line.startswith(f"my.yaml: {key}")
    assert reason in line


def test_a_great_many_mistakes_are_told_in_a_few_lines(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: demo\n" + "".join(f"key{number}: 1\n" for number in range(5_000)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(caught.value.mistakes) == MOST_TOLD + 1
    assert caught.value.mistakes[0].startswith(f"{path}: line 2: unknown key 'key0'")
    assert caught.value.mistakes[-1] == f"{path}: and {5_000 - MOST_TOLD:,} more mistakes; mend these first"
