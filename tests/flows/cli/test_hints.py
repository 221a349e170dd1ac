"""A command in a message can be copied: it stands on one line however narrow the terminal is, and its words are quoted
for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from tests.fake_stages import FAKES, config_at
from tests.flows.test_no_server import stand_ins as stand_ins
from tests.standin_cli import install

NAMES = ["my own  data", "it's", 'say "x" & go', "a$HOME(b)"]


@pytest.fixture(params=NAMES)
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: None) -> Path:
    """A root with a name that a shell would take apart, and a terminal of 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    return tmp_path / request.param


def write_config(root: Path, prompts: list[str]) -> str:
    folder = root.parent / "config"
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    config = config_at(root, prompts=str(folder / "prompts.txt"), samples_per_shard=1)
    (folder / "demo.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return str(folder / "demo.yaml")


def commands(said: str) -> list[list[str]]:
    """The words of each command of ours that a text names, as a shell reads them."""
    found = []
    for line in said.splitlines():
        for part in line.replace(", then: ", "; ").replace(" --retry-errors", " --retry-errors; ").split("; "):
            _, verb, rest = part.partition("resmaster ")
            if verb and not part.startswith("resmaster: "):
                found.append(shlex.split(rest))
    return found


def gone(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def broken(folder: Path) -> None:
    for path in folder.glob("high_res/*.tar"):
        path.write_bytes(b"")
    assert main(["verify", str(folder)]) == 1


def unreadable(folder: Path) -> None:
    for path in folder.glob("commits/high_res-*/*.json"):
        path.write_text("{")


SCENES: list[tuple[Callable[[Path], object], list[str], str]] = [
    (lambda folder: None, ["publish"], "repair"),
    (lambda folder: None, ["status"], "explain"),
    (lambda folder: gone(folder, "manifest.parquet"), ["status"], "publish"),
    (broken, ["verify"], "repair"),
    (broken, ["status"], "repair"),
    (broken, ["explain", "0"], "repair"),
    (broken, ["publish"], "repair"),
    (unreadable, ["explain", "0"], "verify"),
    (unreadable, ["gc"], "verify"),
    (lambda folder: None, ["explain", "ffffffffffff"], "explain"),
]


def named(folder: Path, said: str, verb: str) -> list[str]:
    """The first command with the verb; its first word after the verb must be the dataset."""
    found = [words for words in commands(said) if words[:1] == [verb]]
    assert found, said
    for words in found:
        assert words[1] == str(folder), said
    return found[0]


def test_a_build_with_missing_shards_names_the_next_command(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(config: DatasetConfig, samples: object) -> object:
        raise OSError("Connection reset by a peer with a rather long name")

    install({"high_res": fails})
    monkeypatch.setattr("resmaster_stages.runner.retrying.time.sleep", lambda seconds: None)
    assert main(["run", write_config(root, ["a", "b"])]) == 1
    words = named(root / "demo", capsys.readouterr().err, "repair")
    install(FAKES)
    assert main(words) == 0, "the command works as it was printed"


def test_a_build_with_too_few_samples_names_the_next_commands(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", write_config(root, ["bad high_res", "bad low_res", "c"])]) == 1
    said = capsys.readouterr().err
    assert named(root / "demo", said, "repair")[2:] == ["--retry-errors"]
    assert main(named(root / "demo", said, "explain")) == 0


@pytest.mark.parametrize(("change", "command", "verb"), SCENES)
def test_every_verb_names_commands_that_can_be_copied(
    change: Callable[[Path], object], command: list[str], verb: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = ["bad high_res 1", "bad high_res 2"] if change.__name__ == "<lambda>" else ["a", "b"]
    config = write_config(root, failing)
    load = yaml.safe_load(Path(config).read_text())
    Path(config).write_text(yaml.safe_dump({**load, "samples_per_shard": 2}))
    main(["run", config])
    change(root / "demo")
    capsys.readouterr()
    main([command[0], str(root / "demo"), *command[1:]])
    said = capsys.readouterr()
    named(root / "demo", said.out + said.err, verb)
