"""Any words behind any verb: an exit status and a few lines, never a traceback, and no input is lost."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from resmaster_flows.cli.main import VERBS, main
from resmaster_stages.redaction import LINE_CHARACTERS
from tests.checkout import PYTHONPATH
from tests.fake_stages import planned

WORDS = (
    *("", " ", "-", "--", "---", "-1", "0", "1", "2147483648", "1" + "0" * 30, "9" * 5_000, "1e308", "nan", "inf"),
    *("a\0b", "\udcff\udcfe", "\x1b[31m", "é" * 200, "x" * 300, "x" * 100_000, "x/" * 3_000, "a,b", "=", "*", "%s"),
    *(".", "..", "~nobody", "/dev/null", "s3://", "s3:///x", "file://", "memory://x", "0-99999999", "0-1"),
    *("resmaster", "resmaster:steps=[", "resmaster+", "lanczos", "picturebook", "4x4", "0x0", "99x99", "low_res"),
    *("c.yaml", "p.txt", "photo.png", "out/demo", "new.png", "new"),
    *(
        "upscale.steps=3",
        "upscale.steps",
        "upscale.=",
        "captions.grid=tiles",
        "a=[",
        "prompts=p.txt",
        "keep",
        "16",
        "png",
    ),
)
TELLING = ("--verbose", "--quiet", "--log-file", "--traceback=")
"""Options of every verb."""
USUAL = {
    "init": ["new"],
    "run": ["c.yaml"],
    "plan": ["c.yaml"],
    "status": ["out/demo"],
    "view": ["out/demo"],
    "explain": ["out/demo", "0"],
    "repair": ["out/demo"],
    "verify": ["out/demo"],
    "publish": ["out/demo"],
    "curate": ["out/demo"],
    "export": ["out/demo", "exported", "--as", "folder"],
    "gc": ["out/demo"],
    "doctor": ["new"],
    "compare": ["c.yaml", "--methods", "lanczos"],
    "upscale": ["photo.png", "new.png", "--method", "lanczos"],
    "app": [],
    "schema": [],
    "completion": ["bash"],
}
"""What each verb takes."""
OPTIONS = {
    "plan": ("--limit", "--root", "--prompts", "--images", "--workers", "--price", "--estimate", "--set"),
    "run": ("--limit", "--root", "--prompts", "--images", "--executor", "--set"),
    "init": ("--base", "--prompts", "--images"),
    "status": ("--openmetrics", "--json"),
    "view": ("--port", "--who"),
    "explain": ("--json",),
    "repair": ("--shards", "--stages"),
    "export": ("--as", "--where", "--sizes", "--limit"),
    "gc": ("--older-than", "--dry-run"),
    "compare": ("--scales", "--reference", "--n", "--limit", "--methods", "--root"),
    "upscale": (
        *("--scale", "--preset", "--prompt", "--detail-mask", "--model", "--captioner", "--config", "--steps"),
        *("--seed", "--method", "--output-format", "--quality", "--suffix", "--bit-depth", "--alpha", "--set"),
    ),
}


class Ended:
    """Stands for the wait of a server, which is over at once."""

    def wait(self) -> None:
        raise SystemExit(0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned dataset, its configuration and prompts, and an image. No flow is run and no model is loaded."""
    planned(tmp_path / "out", ["a", "b"], tmp_path)
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "c.yaml").write_text("name: demo\nroot: out\nprompts: p.txt\nlow_res: {height: 16, width: 16}\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    for verb in ("run", "repair", "compare"):
        monkeypatch.setattr(f"resmaster_flows.cli.{verb}.execute", lambda console, build: 0)
    monkeypatch.setattr("resmaster_flows.cli.view.threading", SimpleNamespace(Event=Ended))  # a folder is served
    monkeypatch.setattr("resmaster_flows.cli.view.webbrowser", SimpleNamespace(open=lambda address: None))
    monkeypatch.setattr("resmaster_stages.models.load.load_pipeline", lambda config: pytest.fail("loads a model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(words: list[str]) -> int | str | None:
    """The exit status of a command."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


def test_every_verb_is_tried() -> None:
    assert list(USUAL) == [verb.name for verb in VERBS]


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_any_words_end_in_a_status_and_a_few_lines(
    folder: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    verb = data.draw(st.sampled_from(sorted(set(USUAL) - {"publish", "doctor", "app"})))
    words = list(USUAL[verb])
    if options := OPTIONS.get(verb):
        words += [data.draw(st.sampled_from(options)), data.draw(st.sampled_from(WORDS))]
    if data.draw(st.integers(0, 9)) == 0:
        words += [data.draw(st.sampled_from(TELLING)), *data.draw(st.lists(st.sampled_from(WORDS), max_size=1))]
    if words and data.draw(st.booleans()):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(WORDS))
    prompts = (folder / "p.txt").read_bytes(), (folder / "photo.png").read_bytes()
    capsys.readouterr()
    assert ended([verb, *words]) in (0, 1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(len(line) <= LINE_CHARACTERS + 200 for line in said.splitlines())
    assert ((folder / "p.txt").read_bytes(), (folder / "photo.png").read_bytes()) == prompts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["repair", "out/demo", "--shards", "0-99999999"], "shard 99999999 is not in the plan, which has 1"),
        (["repair", "out/demo", "--shards", "9" * 5_000], "is not a shard number or a range"),
        (["plan", "c.yaml", "--limit", "1" + "0" * 30], "more than 64 bits"),
        (["upscale", "photo.png", "new.png", "--model", "picturebook", "--seed", "1" + "0" * 30], "seed: "),
        (["upscale", "photo.png", "new.png", "--method", "lanczos", "--scale", "nan"], "scale"),
        (["upscale", "photo.png", "new.png", "--model", ""], "model.id: cannot be empty"),
        (["plan", "c.yaml", "--root", "x" * 300], "a part of 300 bytes"),
        (["plan", "c.yaml", "--root", ""], "cannot be empty"),
    ],
    ids=lambda value: "",
)
def test_numbers_and_names_that_nothing_can_hold(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    line = capsys.readouterr().err.replace("\n", " ")
    assert said in line
    assert len(line) < 400


@pytest.mark.parametrize("verb", ["plan", "status", "upscale"])
def test_bytes_that_are_no_text(verb: str, folder: Path) -> None:
    command = [sys.executable, "-m", "resmaster_flows.cli.main", verb, b"\xff\xfe", *USUAL[verb][1:]]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
