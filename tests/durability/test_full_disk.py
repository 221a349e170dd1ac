"""A disk that fills up in the middle of a build: one clear line, no half of a file, and more space is all it takes."""

import errno
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resmaster_stages.errors import UserError
from resmaster_stages.storage.filesystem import open_root
from tests.durability.injection import PROMPTS, Steps, build, everything, injected


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of `size` at `folder`; skips where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small disk here; the injected fault below is tried everywhere")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def whole_files(root: str) -> bool:
    """Whether no file has a temporary name: what could not be written was taken away."""
    return not any(file.name.endswith(".tmp") for file in open_root(root).files())


@pytest.fixture
def undisturbed(tmp_path: Path) -> tuple[str, dict[object, object]]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    build(str(tmp_path / "undisturbed"), str(prompts))
    return str(prompts), everything(str(tmp_path / "undisturbed"))


@pytest.mark.parametrize("kilobytes", [16, 40, 64, 100])
def test_a_root_that_is_full(kilobytes: int, tmp_path: Path, undisturbed: tuple[str, dict[object, object]]) -> None:
    prompts, expected = undisturbed
    disk = tmp_path / "disk"
    with small_disk(disk, f"{kilobytes}k"):
        root = str(disk / "out")
        with pytest.raises(UserError, match="the disk is full; free some space") as caught:
            build(root, prompts)
        assert "\n" not in str(caught.value)
        assert whole_files(root)
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        build(root, prompts)
        assert everything(root) == expected


def test_a_scratch_disk_that_is_full(
    tmp_path: Path, undisturbed: tuple[str, dict[object, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, expected = undisturbed
    root, disk = str(tmp_path / "out"), tmp_path / "disk"
    with small_disk(disk, "4k"):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(disk))
            with pytest.raises(UserError, match=r"disk.*the disk is full"):
                build(root, prompts)
        assert list(disk.iterdir()) == [], "nothing is left in the scratch folder"
    build(root, prompts)
    assert everything(root) == expected


def test_no_space_in_the_middle_of_any_file(tmp_path: Path, undisturbed: tuple[str, dict[object, object]]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prompts, expected = undisturbed
    recorded = Steps()
    with injected(recorded, str(tmp_path / "recorded")):
        build(str(tmp_path / "recorded"), prompts)
    halves = [at for at, step in enumerate(recorded.seen) if step.startswith("half of")]
    assert len(halves) > 20
    for at in halves[::4]:
        root = str(tmp_path / f"out{at}")
        with pytest.raises(UserError, match="the disk is full"), injected(Steps(at, full), root):
            build(root, prompts)
        assert whole_files(root)
        build(root, prompts)
        assert everything(root) == expected
