"""The command line: bad input is one line and exit status 2, writes nothing, loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageCms

from resmaster_flows.cli.main import main, parser
from resmaster_flows.selection import parse_numbers, parse_stages
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset.dataset import create_or_open
from resmaster_stages.errors import UserError
from resmaster_stages.prompts import ingest


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A small picturebook dataset: two prompts, 128 -> 256 px."""
    (tmp_path / "prompts.txt").write_text("a red house on a meadow\na green tree in the snow\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "root": str(tmp_path / "out"),
                "prompts": "prompts.txt",
                "samples_per_shard": 1,
                "low_res": {"steps": 2},
                "upscale": {"steps": 2, "scale": 2},
            }
        )
    )
    return path


def edit(path: Path, **values: object) -> Path:
    config = yaml.safe_load(path.read_text())
    for key, value in values.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(config))
    return path


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Run a command that must fail as a user's mistake does; returns its one line."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("resmaster: ")
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("change", "culprits"),
    [
        ({"upscal": 1}, ["upscal"]),
        ({"upscale": {"method": "magic"}}, ["magic", "resmaster"]),
        ({"upscale": {"scale": 0.5}}, ["upscale.scale"]),
        ({"upscale": {"scale": 1.51}}, ["scale"]),
        ({"low_res": {"height": 100}}, ["low_res.height", "100"]),
        ({"model": {"id": "no/such-model-anywhere"}}, ["no/such-model-anywhere"]),
        ({"model": {"id": "/nonexistent/folder"}}, ["/nonexistent/folder"]),
        ({"prompts": "absent.txt"}, ["absent.txt"]),
        ({"prompts": None}, ["prompts"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_bad_configurations(
    command: str, change: dict, culprits: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, command, edit(config_file, **change))
    for culprit in culprits:
        assert culprit in message
    assert not (config_file.parent / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "culprit"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("blank.txt", b"\n  \n", "blank.txt"),
        ("binary.txt", bytes(range(256)) * 8, "binary.txt"),
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "broken.jsonl"),
        ("other.csv", b"text\nhello\n", "prompt"),
        ("prompts.doc", b"hello", ".doc"),
    ],
)
def test_bad_prompt_files(
    name: str, content: bytes, culprit: str, config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config_file.parent / name).write_bytes(content)
    assert culprit in fails(capsys, "run", config_file, "--prompts", config_file.parent / name)
    assert not (config_file.parent / "out").exists()


def test_no_images(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    assert "images" in fails(capsys, "run", config_file, "--images", tmp_path / "images")
    assert "nowhere" in fails(capsys, "run", config_file, "--images", tmp_path / "nowhere")


def test_root_not_writable(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in fails(capsys, "run", config_file, "--root", tmp_path / "file")
    said = fails(capsys, "plan", config_file, "--root", tmp_path / "file" / "below")
    assert "a file is in the way where a folder is needed; choose another place" in said
    assert (tmp_path / "file").read_text() == "not a folder"


def test_root_without_permission(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "resmaster_stages.planning.checks.os.access", lambda path, mode: False
    )  # root may write anywhere
    message = fails(capsys, "run", config_file)
    assert f"{tmp_path} does not allow it" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["status", "repair"])
def test_no_dataset_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in fails(capsys, command, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_contradicts_the_dataset(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_or_open(load_config(config_file))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert before
    message = fails(capsys, "run", edit(config_file, samples_per_shard=2))
    for part in ("samples_per_shard is 1", "2 in the configuration", "another name or root"):
        assert part in message
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_damaged_dataset_configuration(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_or_open(load_config(config_file))
    damaged = tmp_path / "out" / "tiny" / "config.json"
    damaged.write_bytes(damaged.read_bytes()[:40])
    assert "config.json" in fails(capsys, "status", tmp_path / "out")


def test_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.yaml" in fails(capsys, "run", tmp_path / "absent.yaml")


def test_bad_limit(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--limit" in fails(capsys, "run", config_file, "--limit", "0")


def test_upscale_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    output = tmp_path / "out.png"
    assert "broken.png" in fails(capsys, "upscale", broken, output, "--model", "picturebook")
    assert "absent.png" in fails(capsys, "upscale", tmp_path / "absent.png", output, "--model", "picturebook")
    good = tmp_path / "good.png"
    Image.new("RGB", (128, 128)).save(good)
    assert "--scale" in fails(capsys, "upscale", good, output, "--scale", "0.5", "--model", "picturebook")
    assert "magic" in fails(capsys, "upscale", good, output, "--method", "magic", "--model", "picturebook")
    assert "'best'; known: default, faithful" in fails(
        capsys, "upscale", good, output, "--method", "demofusion", "--preset", "best", "--model", "picturebook"
    )
    assert ".xyz" in fails(capsys, "upscale", good, tmp_path / "out.xyz", "--model", "picturebook")
    assert "nowhere" in fails(capsys, "upscale", good, tmp_path / "nowhere" / "out.png", "--model", "picturebook")
    assert not output.exists()


@pytest.mark.parametrize("option", ["INPUT", "--detail-mask"])
def test_upscale_opens_only_files_of_known_formats(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program is started, nothing blocks, and each mistake is one line."""
    good, trace = tmp_path / "good.png", tmp_path / "trace"
    Image.new("RGB", (32, 32)).save(good)
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho called >>{trace}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.png").write_bytes(program)
    Image.new("RGB", (32, 32)).save(tmp_path / "ico.jpg", "ICO")
    Image.new("1", (11_000, 11_000)).save(tmp_path / "bomb.png")
    Image.new("F", (32, 32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "fifo.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**30)  # a sparse file
    reasons = {
        "eps.png": "it is none of PNG, JPEG, WebP, TIFF, BMP, GIF",
        "ico.jpg": "it is none of PNG, JPEG, WebP, TIFF, BMP, GIF",
        "bomb.png": "too many pixels (more than 89,478,485); scale it down",
        "float.tif": "scale them to 8 or 16 bits",
        "folder.png": "is a folder; give an image file",
        "dangling.png": "is a link to nothing; give an image file",
        "fifo.png": "is no regular file; give an image file",
        "/dev/zero": "is no regular file; give an image file",
        "huge.png": "has 1,073,741,824 bytes, more than 268,435,456",
        "gone.png": "no such image file",
        "a\0b.png": "cannot be read (embedded null byte)",
        "x" * 300: "cannot be read (File name too long)",
    }
    freescale = tmp_path / "freescale.yaml"
    part = {"method": "freescale", "alpha": 3.0, "alpha_elsewhere": 0.5}
    freescale.write_text(yaml.safe_dump({"name": "x", "model": {"id": "picturebook"}, "upscale": part}))
    for name, reason in reasons.items():
        bad = tmp_path / name
        more = ["--config", freescale, "--method", "freescale"] if option != "INPUT" else ["--model", "picturebook"]
        files = [bad, tmp_path / "out.png"] if option == "INPUT" else [good, tmp_path / "out.png", option, bad]
        line = fails(capsys, "upscale", *files, *more)
        assert reason in line
        assert name.replace("\0", "\\x00") in line
    assert not trace.exists()
    assert not (tmp_path / "out.png").exists()


def test_upscale_decodes_as_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transparency is white, 16 bits keep their values, orientation counts, and the output carries no profile."""
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    clear.quantize(4).save(tmp_path / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 32), "red").save(tmp_path / "turned.tif", exif=exif)
    made = {}
    for name in ("deep.png", "clear.png", "palette.png", "turned.tif"):
        out = tmp_path / f"{name}-out.png"
        argv = ["upscale", tmp_path / name, out, "--method", "lanczos", "--scale", "2"]
        assert main([str(each) for each in argv]) == 0
        assert len(capsys.readouterr().err.splitlines()) == 2  # that it starts, and what came of it
        made[name] = Image.open(out)
        assert "icc_profile" not in made[name].info
    assert made["turned.tif"].size == (64, 96)
    assert made["clear.png"].getextrema() == made["palette.png"].getextrema() == ((255, 255),) * 3
    small = np.asarray(made["deep.png"].convert("L").resize((32, 32), Image.Resampling.BOX), int)
    assert np.abs(small - (ramp >> 8)).max() <= 2


def test_shard_lists() -> None:
    assert parse_numbers("1,4-7", 8) == [1, 4, 5, 6, 7]
    assert parse_numbers(" 3 , 3-3", 8) == [3]
    for wrong in ("", "a", "3-1", "1,,2", "-1", "1-", "1-2-3", "9" * 5_000, "x" * 100_000):
        with pytest.raises(UserError, match="--shards") as caught:
            parse_numbers(wrong, 8)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["8", "0-99999999", "0-3,999999999"])
def test_shards_beyond_the_plan_are_refused_before_they_are_counted_out(text: str) -> None:
    with pytest.raises(UserError, match=r"is not in the plan, which has 8 \(from 0\); resmaster status lists them"):
        parse_numbers(text, 8)


def test_stage_lists() -> None:
    assert parse_stages("quality,low_res") == ["low_res", "quality"]
    assert parse_stages(None) is None
    with pytest.raises(UserError, match="unknown stage 'upscale'; known: low_res"):
        parse_stages("upscale")
    with pytest.raises(UserError, match=r"unknown stage 'qualty' \(did you mean 'quality'\?\)"):
        parse_stages("low_res,qualty")


def test_plan_changes_nothing(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config_file)]) == 0
    out = capsys.readouterr().out
    assert "2 samples in 2 shards" in out
    assert not (config_file.parent / "out").exists()


def test_plan_lists_what_is_rejected_and_what_is_left_out(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = config_file.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "p.csv").write_text("prompt\na barn\n" + "a  barn\n" * 12 + '""\n')
    assert main(["plan", str(config_file), "--prompts", "~/p.csv"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 samples in 1 shards" in out
    assert "12 duplicates left out; 1 rejected" in out
    assert f"rejected: {home}/p.csv:15: empty" in out
    assert f"duplicate: {home}/p.csv:3: equals sample " in out
    assert out.count("duplicate: ") == 10
    assert "... and 2 more duplicates" in out


@pytest.mark.parametrize("option", ["--prompts", "--images"])
def test_an_empty_source_is_not_the_current_folder(
    config_file: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("plan", "run"):
        assert "--prompts and --images cannot be empty" in fails(capsys, command, config_file, option, "")


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "plan", "status", "repair", "upscale"):
        with pytest.raises(SystemExit) as caught:
            parser().parse_args([command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert len(text) > 300, command


def test_the_help_names_every_verb_and_loads_no_heavy_library() -> None:
    script = (
        "import sys\n"
        "from resmaster_flows.cli.main import VERBS, parser\n"
        "text = parser().format_help()\n"
        "assert all(verb.help in ' '.join(text.split()) for verb in VERBS)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'prefect'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["biuld"])
    assert caught.value.code == 2
    assert "invalid choice: 'biuld'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["--methods", "magic"], ["magic", "resmaster"]),
        (["--methods", "resmastr+sg"], ["resmaster has sg, tip, etp"]),
        (["--methods", "resmaster+x"], ["'x'", "sg, tip, etp"]),
        (["--methods", "resmaster+tipp"], ["'tipp' (did you mean 'tip'?)"]),
        (["--methods", "direct", "--scales", "4"], ["--scales 4", "2x4"]),
        (["--methods", "direct", "--n", "0"], ["0", "at least 1"]),
        (["--methods", "direct", "--prompts", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_compare_refuses_before_it_starts(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], culprits: list[str]
) -> None:
    line = fails(capsys, "compare", config_file, *arguments)
    for culprit in culprits:
        assert culprit in line
    assert not (config_file.parent / "out").exists(), "nothing was written"


def test_a_missing_extra_is_found_before_anything_starts(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = fails(capsys, "run", edit(config_file, quality={"features": "inception"}))
    assert "resmaster-pipeline[inception]" in line
    assert not (config_file.parent / "out").exists()


def test_plan_and_run_ask_for_a_source_also_where_a_plan_exists(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(load_config(config_file))
    without = edit(config_file, prompts=None)
    for command in ("plan", "run"):
        assert "nothing to plan: give prompts or images" in fails(capsys, command, without)


@pytest.mark.parametrize("command", ["plan", "status"])
def test_a_reader_who_stops_reading_ends_it_quietly(config_file: Path, command: str) -> None:
    """Tables are Rich's to print, `--json` is ours."""
    config = load_config(config_file)
    ingest(config)
    words = ["plan", str(config_file)] if command == "plan" else ["status", str(config_file.parent / "out"), "--json"]
    script = (
        "import os, sys\n"
        "from resmaster_flows.cli.main import main\n"
        "reading, writing = os.pipe()\n"
        "os.close(reading)\n"
        "os.dup2(writing, 1)\n"
        f"sys.exit(main({words!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


def test_all_mistakes_of_a_configuration_are_lines_of_their_own(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text("name: tiny\nimagse: x\nseed: -1\n")
    assert main(["plan", str(config_file)]) == 2
    unknown, seed = capsys.readouterr().err.splitlines()
    assert seed.startswith(f"resmaster: {config_file}: line 3: seed: ")
    assert unknown.startswith(f"resmaster: {config_file}: line 2: unknown key 'imagse' (did you mean 'images'?)")


@pytest.mark.parametrize("root", ["https://host/x", "hf://datasets/me/x", "gs://bucket", "s3:/datasets", "s3:///x"])
@pytest.mark.parametrize("verb", ["plan", "run", "status", "explain", "repair", "verify", "gc", "doctor"])
def test_only_folders_and_s3_are_roots(
    verb: str, root: str, config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config_file.parent)
    monkeypatch.setattr("resmaster_flows.cli.execute.require_surroundings", lambda config: None)
    command = [verb, config_file, "--root", root] if verb in ("plan", "run") else [verb, root]
    assert "s3://" in fails(capsys, *command, *(["key"] if verb == "explain" else []))
    assert sorted(path.name for path in config_file.parent.iterdir()) == ["prompts.txt", "tiny.yaml"]


def test_an_error_of_the_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, name: str) -> bool:
        raise OSError(5, "Input/output error", name)

    monkeypatch.setattr("resmaster_stages.storage.filesystem.Folder.exists", broken)
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "resmaster: [Errno 5] Input/output error: ''\n"
