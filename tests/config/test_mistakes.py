"""All mistakes in a configuration at once, each with its line. Nothing that a user may write ends in a traceback."""

import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import MAX_BYTES, load_config, parse_config
from resmaster_stages.config.method import Method, methods
from resmaster_stages.config.part import Part
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.errors import ConfigError
from resmaster_stages.evaluation.variants import variants
from resmaster_stages.models.identity import Weights

WRONG = """\
name: demo
imagse: folder
samples_per_shard: four
upscale:
  method: demofusion
  setps: 5
captions: {source: modle}
model:
  dtype: float61
"""


def mistakes(tmp_path: Path, text: str | bytes, **overrides: Any) -> list[str]:
    """The lines of the error that a file's content leads to, without the file's name."""
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path, **overrides)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    found = sorted(mistakes(tmp_path, WRONG))
    assert [line[:7] for line in found] == ["line 2:", "line 3:", "line 6:", "line 7:", "line 9:"]
    for line, word, meant in (
        (found[0], "'imagse'", "images"),
        (found[2], "'upscale.setps'", "steps"),
        (found[3], "captions.source", "model"),
        (found[4], "model.dtype", "float16"),
    ):
        assert word in line
        assert line.endswith(f"; did you mean {meant!r}?")
    assert "samples_per_shard" in found[1]
    assert "did you mean" not in found[1]


@pytest.mark.parametrize(
    ("upscale", "meant"),
    [
        ({"method": "resmastr"}, "resmaster"),
        ({"preset": "faithfull"}, "faithful"),
        ({"structure": {"preset": "papr"}}, "paper"),
        ({"structure": {"cutof": 1}}, "cutoff"),
        ({"structure": {"weight": "constnt"}}, "constant"),
    ],
)
def test_a_misspelt_word_is_put_right(upscale: dict[str, Any], meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean '{meant}'\?$"):
        parse_config({"name": "demo", "upscale": upscale})


def test_variants_of_a_comparison_are_put_right_too() -> None:
    config = parse_config({"name": "demo", "prompts": "p.txt"})
    for text, message in (
        ("resmastr", r"did you mean 'resmaster'\?"),
        ("resmaster:stpes=4", r"did you mean 'steps'\?"),
        ("resmaster:structure.preset=[]", "unknown preset"),
        ("resmaster:method=[]", "unknown method"),
        ("resmaster:steps=[", "is no value"),
        ("resmaster:scale=1:scale.x=2", "give one of both"),
        ("resmaster:stride=.inf", "finite"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            variants(config, text, "2x2")
        assert str(caught.value).startswith(f"--methods {text}: ")


def test_one_mistake_stays_one_line_and_what_the_command_line_gives_has_none(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "name: demo\nseed: -1\n") == ["line 2: seed: Input should be greater than or equal to 0"]
    assert mistakes(tmp_path, "name: demo\nlimit: 3\n", limit=0) == [
        "limit: Input should be greater than or equal to 1"
    ]
    assert mistakes(tmp_path, "prompts: a\n") == ["name: Field required"]


def test_a_key_that_is_given_twice_names_both_lines(tmp_path: Path) -> None:
    text = "name: demo\nprompts: a\nupscale:\n  scale: 2\n  scale: 4\nprompts: b\nseed: -1\n"
    assert sorted(mistakes(tmp_path, text)) == [
        "line 5: 'scale' is given twice, first at line 4",
        "line 6: 'prompts' is given twice, first at line 2",
        "line 7: seed: Input should be greater than or equal to 0",
    ]
    assert mistakes(tmp_path, "name: demo\nname: demo\n") == ["line 2: 'name' is given twice, first at line 1"]


BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("# nothing\n", "expected a mapping"),
        ("- a\n", "expected a mapping"),
        ("name: demo\n\tseed: 1\n", "not valid YAML at line 2"),
        ("name: a\n---\nname: b\n", "not valid YAML at line 2"),
        ("name: a\0b\n", "not valid YAML"),
        (BOMB, "aliases stand for more than"),
        (MERGED, "aliases stand for more than"),
        ("a: &a [*a]\n", "aliases stand for more than"),
        ("[" * 20_000, "nested too deeply"),
        ("seed: " + "9" * 5000, "a value cannot be read"),
        ("seed: 2024-13-45", "a value cannot be read"),
        ("seed: !!timestamp x", "a value cannot be read"),
        ("seed: !!bool x", "a value cannot be read"),
        ("seed: !!python/object:os.system x", "not valid YAML at line 1"),
        ("? [a]\n: b\n", "not valid YAML at line 1"),
        (b"\xff\xfe\0", "not a text file"),
        (b"#" * (MAX_BYTES + 1), "has more than 1,048,576 bytes"),
    ],
    ids=range(18),
)
def test_a_file_that_cannot_be_read_is_one_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, text)
    assert message in line
    assert len(line) < 300


def test_an_alias_is_as_good_as_what_it_stands_for(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: &n demo\nmodel: &m {id: x}\ncaptions: {model: *n}\nquality: {clip: *n}\n")
    assert load_config(tmp_path / "c.yaml").captions.model == "demo"


@pytest.mark.parametrize("key", ["name", "root", "prompts", "images"])
def test_characters_that_no_file_can_hold(key: str, tmp_path: Path) -> None:
    for escape in ("\\0", "\\ud800"):
        found = mistakes(tmp_path, f'name: demo\n{key}: "a{escape}b"\n')
        assert found[-1].startswith(f"line 2: {key}: ")
        assert "leave it out" in found[-1] or key == "name"


def test_a_long_value_is_not_repeated_whole() -> None:
    for values in ({"upscale": {"method": "m" * 100_000}}, {"upscale": {"preset": "p" * 100_000}}, {"k" * 100_000: 1}):
        with pytest.raises(ConfigError) as caught:
            parse_config({"name": "demo", **values})
        assert len(str(caught.value)) < 3_000


# ----------------------------------------------------------------------------------------------------------------------
# any value at any place


def places(part: type[Part], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field of a part and of the parts in it."""
    for name, field in part.model_fields.items():
        yield (*path, name)
        candidates = [field.annotation, *typing.get_args(field.annotation)]
        for inner in [each for each in candidates if isinstance(each, type) and issubclass(each, Part)]:
            if inner is not Method:
                yield from places(inner, (*path, name))


METHODS = [(("upscale", *path), name) for name, method in methods().items() for path in places(method)]
PLACES = [(path, "resmaster") for path in [*places(DatasetConfig), ("upscale", "structure", "preset")]] + METHODS
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["a\0b", "\ud800", "s3:/x", "~", "", " ", "x" * 5000, [], {}, [[]], {"preset": []}, {1: 2}, b"x"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300)
@given(st.sampled_from(PLACES), VALUES)
def test_any_value_is_taken_or_refused_in_words(where: tuple[tuple[str, ...], str], value: Any) -> None:
    path, method = where
    values: dict[str, Any] = {"name": "demo", "prompts": "p.txt", "upscale": {"method": method}}
    inner = values
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    try:
        config = parse_config(values, "my.yaml")
    except ConfigError as refused:
        bare = [line for line in str(refused).splitlines() if not line.startswith("my.yaml: ")]
        assert not bare
        return
    assert hashes_of(config, Weights("model", "captioner", "clip"))
    assert parse_config(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_no_field_takes_a_number_without_a_value(number: float) -> None:
    for path, method in PLACES:
        values: dict[str, Any] = {"name": "demo", "upscale": {"method": method}}
        inner = values
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = number
        with pytest.raises(ConfigError):
            parse_config(values)
