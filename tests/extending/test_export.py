"""A format of exports that this module lists is one of the command."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.publish.exports import FORMATS
from resmaster_stages.publish.exports.format import Format, Item, Part, Place, Row
from tests.publish.exports.common import NAMES, built


def write(items: Iterator[Item], place: Place) -> Iterator[Row]:
    for item in items:
        place.write(f"{item.key}.prompt", item.prompt.encode())
        yield {"prompt": item.prompt}


def finish(parts: Sequence[Part], whole: Place, scratch: Path) -> Sequence[str]:
    prompts = [row["prompt"] for part in parts for row in part.rows()]
    whole.write("prompts.json", json.dumps(prompts).encode())
    return (f"{len(prompts)} prompts",)


PROMPTS = Format("prompts", "people", write, finish)


@pytest.fixture
def listed() -> Iterator[None]:
    FORMATS.append(PROMPTS)
    yield
    FORMATS.remove(PROMPTS)


@pytest.mark.usefixtures("listed")
def test_it_is_one_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = built(tmp_path / "out", tmp_path)
    words = ["export", dataset.url, str(tmp_path / "x"), "--as", "prompts"]
    assert main([*words, "--where", "index < 4"]) == 0
    assert "3 prompts" in capsys.readouterr().err
    assert json.loads((tmp_path / "x" / "prompts.json").read_text()) == NAMES[:3]
    assert len(list((tmp_path / "x").glob("*.prompt"))) == 3
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "prompts: people" in " ".join(capsys.readouterr().out.split())


def test_names_and_readers_are_their_own_and_on_the_page() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "exporting.md").read_text()
    assert len({each.name for each in FORMATS}) == len(FORMATS)
    for each in FORMATS:
        assert f"| `{each.name}` |" in page
        assert f"--as {each.name}" in page
