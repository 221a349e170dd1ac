"""`--verbose`, `--quiet` and `--log-file`: of every verb, before or after it."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from resmaster_flows.cli.main import VERBS, main, parser
from resmaster_flows.cli.telling import OURS
from tests.checkout import PYTHONPATH
from tests.fake_stages import planned
from tests.flows.cli.test_any_arguments import USUAL
from tests.flows.test_no_server import stand_ins as stand_ins

LANCZOS = ("--method", "lanczos", "--scale", "2")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} (DEBUG|INFO|WARNING|ERROR) ")


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 12), 60).convert("RGB").save("photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
@pytest.mark.parametrize("option", ["--verbose", "-v", "--quiet", "-q", "--traceback", "--log-file=l.txt"])
def test_every_verb_takes_them_before_and_after_itself(verb: object, option: str) -> None:
    name = verb.name  # type: ignore[attr-defined]
    plain = vars(parser().parse_args([name, *USUAL[name]]))
    for words in ([option, name, *USUAL[name]], [name, option, *USUAL[name]], [name, *USUAL[name], option]):
        changed = {key for key, value in vars(parser().parse_args(words)).items() if value != plain[key]} - {"verb"}
        assert len(changed) == 1
        assert changed <= {"verbose", "quiet", "traceback", "log_file"}


def test_quiet_tells_results_and_mistakes_only(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "photo.png", "a.png", *LANCZOS, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["-q", "upscale", "gone.png", "b.png", *LANCZOS]) == 2
    assert capsys.readouterr().err == "resmaster: gone.png: no such image file\n"
    Path("bad.png").write_bytes(b"no image")
    assert main(["upscale", "photo.png", "bad.png", "large", "-q", *LANCZOS]) == 1
    bad, summary = capsys.readouterr().err.splitlines()
    assert bad.startswith("resmaster: bad.png: not a readable image")
    assert summary == "1 of 2 images upscaled, 1 failed"


def test_what_is_printed_for_programs_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tmp_path / "out", ["a", "b"], tmp_path)
    outs = []
    for more in ((), ("--quiet",), ("--verbose",)):
        main(["status", str(tmp_path / "out" / "demo"), "--json", *more])
        outs.append(capsys.readouterr().out)
    assert outs[0]
    assert outs[1:] == outs[:1] * 2


def test_a_quiet_build_tells_its_result(
    tmp_path: Path, stand_ins: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\nb\nbad high_res\nc\nd\n")
    Path("c.yaml").write_text("name: demo\nprompts: p.txt\nlow_res: {height: 16, width: 16}\n")
    assert main(["run", "c.yaml", "--quiet"]) in (0, 1)
    out, err = capsys.readouterr()
    assert out.startswith("report: ")
    assert err.splitlines()[0] == f"4 samples, 1 failed (see errors/) in {tmp_path}/out/demo"


def test_verbose_tells_events_and_decisions(
    tmp_path: Path, stand_ins: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\n")
    Path("c.yaml").write_text("name: demo\nprompts: p.txt\nlow_res: {height: 16, width: 16}\n")
    assert main(["run", "c.yaml", "--verbose"]) == 0
    said = capsys.readouterr().err
    assert "  ShardStarted(stage='low_res', shard=0, samples=1)" in said
    assert "  ShardDone(stage='quality', shard=0, samples=1, cached=False)" in said
    assert "  resmaster 0.1.0: run c.yaml --verbose" in said
    assert "  configuration c.yaml: {'name': 'demo', " in said
    assert not logging.getLogger("resmaster_stages").handlers


def test_the_log_has_all_with_times(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "photo.png", "a.png", "--quiet", "--log-file", "l.txt", *LANCZOS]) == 0
    assert main(["--log-file", "l.txt", "upscale", "gone.png", "b.png", *LANCZOS]) == 2
    capsys.readouterr()
    lines = Path("l.txt").read_text().splitlines()
    assert "resmaster 0.1.0: upscale photo.png a.png --quiet" in lines[0]
    text = "\n".join(lines)
    assert "INFO photo.png (16 x 12 px) -> a.png (32 x 24 px)" in text
    assert "INFO resmaster: gone.png: no such image file" in text
    assert "Traceback (most recent call last):" in text
    assert len([line for line in lines if "DEBUG ended after" in line]) == 2, "appended"
    assert all(LINE.match(line) for line in lines[:3])
    assert not any(logging.getLogger(name).handlers for name in OURS)


def test_warnings_of_libraries_are_in_the_log_and_still_told(photo: Path) -> None:
    """In a process of its own, where nothing else listens to the loggers."""
    script = (
        "import logging, sys\n"
        "from resmaster_flows.cli import init, main\n"
        "def run(args, console):\n"
        "    logging.getLogger('other').warning('a library warns')\n"
        "    logging.getLogger('resmaster_stages.x').warning('we warn')\n"
        "    logging.getLogger('other').info('chatter')\n"
        "    return 0\n"
        "init.run = run\n"
        "sys.exit(main.main(sys.argv[1:]))\n"
    )
    told = {}
    for words in ((), ("--log-file", "l.txt"), ("--verbose",)):
        done = subprocess.run(
            [sys.executable, "-c", script, "init", *words],
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            check=True,
        )
        told[words] = [line.strip() for line in done.stderr.splitlines()]
    assert told[()] == told["--log-file", "l.txt"] == ["a library warns", "we warn"]
    assert {"a library warns", "we warn"} < set(told["--verbose",])
    log = Path("l.txt").read_text()
    assert "WARNING a library warns" in log
    assert "WARNING we warn" in log
    assert "chatter" not in log


def test_the_log_holds_no_credentials(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-key")
    assert main(["status", "s3://user:very-secret-key@host/x?token=abcdefgh", "--log-file", "l.txt"]) == 2
    assert main(["upscale", "very-secret-key.png", "b.png", "--log-file", "l.txt", *LANCZOS]) == 2
    text = Path("l.txt").read_text()
    assert "secret-key" not in text
    assert "abcdefgh" not in text
    assert "[hidden].png: no such image file" in text


@pytest.mark.parametrize("name", ["photo.png", "mine.yaml", "gone/l.txt", ".", "a\0b", "photo.png/l.txt"])
def test_a_log_that_cannot_be_written(name: str, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("name: mine\n")
    before = photo.read_bytes()
    assert main(["upscale", "photo.png", "a.png", "--log-file", name, *LANCZOS]) == 2
    assert (photo.read_bytes(), Path("mine.yaml").read_text()) == (before, "name: mine\n")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("resmaster: --log-file ")
    assert line.endswith("; give another file")
    assert not Path("a.png").exists()


def test_loud_and_quiet_at_once(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-v", "upscale", "photo.png", "a.png", "-q", *LANCZOS]) == 2
    assert capsys.readouterr().err == "resmaster: --verbose and --quiet exclude each other: give one\n"
