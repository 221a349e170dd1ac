"""A build that is killed at any moment and run again ends as if nothing had happened. Real CLI, real model, real
kills."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

PROMPTS = ["a red house on a green meadow", "a blue balloon in the sky", "a green tree in the snow"]


def write_config(folder: Path, **values: object) -> Path:
    """A tiny picturebook dataset: 3 prompts in 2 shards, 128 -> 192 px in 3 steps."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    path = folder / "tiny.yaml"
    config = {
        "name": "tiny",
        "prompts": "prompts.txt",
        "samples_per_shard": 2,
        "image_format": "png",
        "low_res": {"steps": 3},
        "captions": {"max_new_tokens": 8},
        "upscale": {"scale": 1.5, "steps": 3, "micro_conditioning": "native", "negative_prompt": ""},
        **values,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, root: Path, *extra: str) -> subprocess.Popen[str]:
    return command("run", str(config), "--root", str(root), *extra)


def command(*words: str, threads: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "resmaster_flows.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )


def found(root: Path, pattern: str) -> list[str]:
    texts = []
    for path in (root / "tiny").glob(pattern):
        with suppress(FileNotFoundError):  # it may go at any time
            texts.append(path.read_text())
    return texts


def kill_when(config: Path, root: Path, awaited: str) -> None:
    """Start a build, and kill it as soon as there is a file `awaited` that was not there before."""
    kill_command_when(root, awaited, "run", str(config), "--root", str(root))


def kill_command_when(root: Path, awaited: str, *words: str) -> None:
    """Start a command, and kill all of its processes as soon as there is a new file `awaited`."""
    before = found(root, awaited)
    process = command(*words)
    deadline = time.monotonic() + 150
    while found(root, awaited) in ([], before):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    return out + err


def receipts(root: Path) -> dict[tuple[str, str], dict]:
    """(stage, shard) -> commit record."""
    found = {}
    for path in sorted((root / "tiny" / "commits").glob("*/*.json")):
        record = json.loads(path.read_text())
        found[record["stage"], path.stem] = record
    return found


def contents(root: Path) -> dict[tuple[str, str], str]:
    """(stage, shard) -> sha256 of the object that its commit names, computed from the file itself."""
    return {
        place: hashlib.sha256((root / "tiny" / record["objects"][0]["name"]).read_bytes()).hexdigest()
        for place, record in receipts(root).items()
    }


def members(root: Path, stage: str, number: str) -> dict[str, bytes]:
    """The files in the tar of a commit."""
    with tarfile.open(root / "tiny" / receipts(root)[stage, number]["objects"][0]["name"]) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = write_config(folder)
    finish(start(config, folder / "out"))
    return config, folder / "out"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_and_run_again_gives_the_same_bytes(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    config, reference = uninterrupted
    root = tmp_path / "out"

    for awaited in ("commits/low_res-*/000000.json", "commits/high_res-*/000000.json"):
        kill_when(config, root, awaited)

    before = receipts(root)
    assert 0 < len(before) < 8
    text = finish(start(config, root))
    after = receipts(root)
    assert len(after) == 8  # 4 stages x 2 shards
    for place, record in before.items():
        assert after[place] == record, "a committed shard was done again"
    assert contents(root) == contents(reference)
    assert "report:" in text

    again = finish(start(config, root))
    assert receipts(root) == after
    assert "3 samples" in again


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_draw_that_is_killed_and_repaired_gives_the_same_bytes(
    uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    """The other sample of the shard and the other shard stay as they were. `verify` and `repair` put both back."""
    calm, killed = (shutil.copytree(uninterrupted[1], tmp_path / name) for name in ("calm", "killed"))
    before = contents(calm)
    key, neighbour, _ = pq.read_table(calm / "tiny" / "manifest.parquet")["key"].to_pylist()
    finish(command("repair", str(calm), "--redo", key))
    for awaited in ("redo/0001.json", "commits/low_res-*/000000.2.json", "commits/high_res-*/000000.2.json"):
        words = ["--redo", key[:8]] if awaited.startswith("redo") else []
        kill_command_when(killed, awaited, "repair", str(killed), *words)
    finish(command("repair", str(killed)))
    after = contents(calm)
    assert contents(killed) == after
    assert {place: after[place] for place in before} == before
    assert {place[1] for place in after.keys() - before.keys()} == {"000000.2"}
    for stage in ("low_res", "high_res"):
        assert receipts(calm)[stage, "000000.2"]["takes"] == {key: 1}
        old, new = (members(calm, stage, number) for number in ("000000", "000000.2"))
        assert {name for name in new if new[name] != old[name]} == {f"{key}.png", f"{key}.json"}
        assert any(name.startswith(neighbour) for name in new)
    for (_, number), record in receipts(killed).items():
        if number == "000000.2":
            os.truncate(killed / "tiny" / record["objects"][0]["name"], 1000)
    verified = command("verify", str(killed))
    verified.communicate(timeout=170)
    assert verified.returncode == 1
    finish(command("repair", str(killed)))
    assert contents(killed) == after


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_build_that_was_killed_twice_in_one_batch_is_repaired_to_its_own_bytes(tmp_path: Path) -> None:
    """On a machine with another number of cores, too."""
    config = write_config(tmp_path, samples_per_shard=3, low_res={"steps": 50})
    root = tmp_path / "out"
    for _ in range(2):  # the breadcrumb is there while the batch is computed, which takes seconds
        kill_when(config, root, "cache/low_res-*/at.json")
    finish(start(config, root))
    record = receipts(root)["low_res", "000000"]
    assert [(batch["slot"], batch["size"], batch["threads"]) for batch in record["batches"]] == [(1, 1, 1)]
    (views,) = receipts(root)["high_res", "000000"]["batches"]
    assert views["size"] == 16, "the configuration leaves it to the device, which is a CPU"
    before = contents(root)
    for each in receipts(root).values():
        os.truncate(root / "tiny" / each["objects"][0]["name"], 1000)
    verified = command("verify", str(root))
    verified.communicate(timeout=170)
    assert verified.returncode == 1
    finish(command("repair", str(root), threads=2))
    assert contents(root) == before
    assert len(before) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_poison_sample_costs_one_ledger_row(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (96, 64), colour).save(images / f"{number}.png")
    noise = Image.effect_noise((96, 96), 80).convert("RGB")
    noise.save(images / "poison.webp", quality=95)
    data = (images / "poison.webp").read_bytes()
    half = len(data) // 2
    (images / "poison.webp").write_bytes(data[:half] + b"\xff" * (len(data) - half))  # of the right length: planned

    config = write_config(tmp_path, prompts=None, images=str(images), samples_per_shard=3)
    root = tmp_path / "out"
    text = finish(start(config, root))
    assert "2 samples, 1 failed" in text
    ledgers = list((root / "tiny" / "errors").glob("*/*.parquet"))
    assert len(ledgers) == 1
    (row,) = pq.read_table(ledgers[0]).to_pylist()
    assert row["stage"] == "low_res"
    assert row["error_class"] == "SampleError"
    assert "poison.webp" in row["message"]
    assert pq.read_table(root / "tiny" / "manifest.parquet").num_rows == 2
