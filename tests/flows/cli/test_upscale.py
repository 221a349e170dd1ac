"""`resmaster upscale`: never loses a file of the user's, and says how far it is."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from resmaster_flows.cli import upscale
from resmaster_flows.cli.main import main
from resmaster_flows.watch.images import upscaling
from resmaster_stages.storage.generation import read_generation
from tests.checkout import PYTHONPATH

LANCZOS = ("--method", "lanczos", "--scale", "2")


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((16, 12), 60).convert("RGB").save("photo.png")
    return tmp_path / "photo.png"


def bytes_there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command ends before it computes anything."""
    assert main(["upscale", *words, *LANCZOS]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def linked(make: Callable[[str, str], None]) -> Callable[[], str]:
    def name() -> str:
        make("photo.png", "other.png")
        return "other.png"

    return name


def through_a_folder() -> str:
    os.mkdir("below")
    return "below/../photo.png"


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize(
    "spell",
    [
        lambda: "photo.png",
        lambda: "./photo.png",
        lambda: os.path.abspath("photo.png"),
        through_a_folder,
        linked(os.symlink),
        linked(os.link),
    ],
    ids=["same", "dot", "absolute", "dots", "link", "hard link"],
)
def test_the_input_is_never_overwritten(
    spell: Callable[[], str], force: tuple[str, ...], photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = spell()
    before = bytes_there(photo.parent)
    for source, target in (("photo.png", other), (other, "photo.png")):
        assert "is the input itself" in refused(capsys, source, target, *force)
    assert bytes_there(photo.parent) == before


def test_a_mask_is_an_input_too(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (16, 12)).save("mask.png")
    words = ("photo.png", "./mask.png", "--detail-mask", "mask.png", "--force")
    assert "is the input itself" in refused(capsys, *words)


def test_an_output_that_is_there_is_overwritten_on_demand(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.png").write_bytes(b"mine")
    assert "is there already; choose another output file, or overwrite it with --force" in refused(
        capsys, "photo.png", "out.png"
    )
    assert Path("out.png").read_bytes() == b"mine"
    assert main(["upscale", "photo.png", "out.png", "--force", *LANCZOS]) == 0
    assert Image.open("out.png").size == (32, 24)
    assert {path.name for path in photo.parent.iterdir()} == {"photo.png", "out.png"}


def test_outputs_that_are_no_files(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink("gone.png", "dangling.png")
    os.mkdir("folder.png")
    os.mkfifo("fifo.png")
    assert "is there already" in refused(capsys, "photo.png", "dangling.png")
    for name in ("folder.png", "fifo.png"):
        assert f"{name}: cannot be written" in refused(capsys, "photo.png", name, "--force")
    assert "cannot be written (File name too long)" in refused(capsys, "photo.png", f"{'x' * 300}.png")
    assert "/dev/stdout: unknown image format" in refused(capsys, "photo.png", "/dev/stdout")


def test_a_file_that_appears_meanwhile_is_kept_and_so_is_the_result(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = upscale.upscale_as_configured

    def slowly(*args: object, **kwargs: object) -> Image.Image:
        Path("out.png").write_bytes(b"another's")
        return compute(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(upscale, "upscale_as_configured", slowly)
    assert main(["upscale", "photo.png", "out.png", *LANCZOS]) == 2
    said = capsys.readouterr().err
    assert Path("out.png").read_bytes() == b"another's"
    (kept,) = {path.name for path in photo.parent.iterdir()} - {"photo.png", "out.png"}
    assert f"out.png: has appeared meanwhile, and is kept; the result is in {kept}" in said
    assert Image.open(kept).size == (32, 24)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("force", [True, False])
def test_a_full_disk_keeps_what_is_there(
    force: bool, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if force:
        Path("out.png").write_bytes(b"mine")
    opened = Path.open

    def open_(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        return opened(Path("/dev/full") if "b" in mode and "r" not in mode else path, mode.replace("x", "w"), **kwargs)

    monkeypatch.setattr(Path, "open", open_)
    assert main(["upscale", "photo.png", "out.png", *LANCZOS, *(["--force"] if force else [])]) == 2
    assert "out.png: cannot be written (No space left on device)" in capsys.readouterr().err
    monkeypatch.undo()
    left = bytes_there(photo.parent)
    assert left.pop("out.png", b"mine") == b"mine"
    assert list(left) == ["photo.png"]


def test_a_rename_that_fails_leaves_no_empty_file(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*names: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("resmaster_flows.cli.image_files.os.replace", fail)
    assert main(["upscale", "photo.png", "out.png", *LANCZOS]) == 2
    assert "out.png: cannot be written (Input/output error)" in capsys.readouterr().err
    assert [path.name for path in photo.parent.iterdir()] == ["photo.png"]


def test_an_image_too_large_for_its_format_is_refused_before_the_work(
    photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (300, 2)).save("wide.png")
    assert main(["upscale", "wide.png", "out.webp", "--method", "lanczos", "--scale", "64"]) == 2
    assert "out.webp: the format holds at most 16383 px a side, not 19200; write a .png file" in capsys.readouterr().err
    assert not Path("out.webp").exists()


def test_a_log_gets_some_lines_and_no_bars(photo: Path) -> None:
    """The embedded model, its captioner and its adapter, whose libraries draw bars by themselves."""
    words = ("upscale", "photo.png", "out.png", "--model", "picturebook", "--scale", "1", "--steps", "2")
    done = subprocess.run(
        [sys.executable, "-m", "resmaster_flows.cli.main", *words],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *between, last = done.stderr.splitlines()
    assert first == "  loading picturebook, captioning patches"
    assert between
    assert all(line.startswith("  upscaling: step ") for line in between)
    assert last == "photo.png (16 x 12 px) -> out.png (16 x 12 px)"


def test_a_log_gets_a_line_per_tenth_of_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    for total, expected in ((100, 10), (37, 10), (4, 4)):
        with upscaling(Console(stderr=True), 1) as begin:
            step = begin("a.png", "loading x")
            for done in range(1, total + 1):
                step(done, total)
        first, *lines = capsys.readouterr().err.splitlines()
        assert first == "  loading x"
        assert len(lines) == expected
        assert lines[-1] == f"  upscaling: step {total} of {total}"


TERM = re.compile(rb"digitalsourcetype/(\w+)<")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".avif"])
def test_the_result_says_how_it_was_made(photo: Path, suffix: str) -> None:
    assert main(["upscale", "photo.png", f"large{suffix}", *LANCZOS]) == 0
    data = Path(f"large{suffix}").read_bytes()
    assert TERM.findall(data) == [b"algorithmicallyEnhanced"], "no trained model had a part in it"
    assert read_generation(data) is None
    words = ("--method", "multidiffusion", "--scale", "1", "--steps", "1", "--model", "picturebook", "--seed", "7")
    Image.new("RGB", (64, 64), "navy").save("photo.png")
    assert main(["upscale", "photo.png", f"drawn{suffix}", "--prompt", "a red house, at night", *words]) == 0
    data = Path(f"drawn{suffix}").read_bytes()
    assert TERM.findall(data) == [b"compositeWithTrainedAlgorithmicMedia"]
    found = read_generation(data)
    assert found is not None
    assert (found.prompt, found.seed) == ("a red house, at night", 7)


def test_a_configuration_may_ask_for_files_that_say_nothing(photo: Path) -> None:
    Path("quiet.yaml").write_text("name: quiet\nprompts: p.txt\nimage_metadata: none\n")
    assert main(["upscale", "photo.png", "large.png", "--config", "quiet.yaml", *LANCZOS]) == 0
    assert b"digitalsourcetype" not in Path("large.png").read_bytes()
