"""What all formats share: who is chosen, bytes that stay, runs that break off, datasets that grow."""

import errno
import io
import json
import math
import multiprocessing
import re
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset, open_dataset
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.errors import UserError
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.exports import FORMATS
from resmaster_stages.publish.exports.export import Exported, export
from resmaster_stages.publish.exports.record import Options
from resmaster_stages.publish.exports.sizes import fitted
from resmaster_stages.publish.publish import publish
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import open_root
from resmaster_stages.storage.images import encode_image
from resmaster_stages.storage.tables import encode_table
from tests.durability.injection import Steps, fail, injected, interrupt, kill
from tests.fake_stages import FAKES, planned
from tests.publish.exports.common import (
    NAMES,
    PROMPTS,
    WIDE,
    built,
    choose,
    content,
    image_of,
    key_of,
    make,
    rows_of,
    visible,
)

ALL = [each.name for each in FORMATS]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return built(tmp_path / "out", tmp_path)


def names(folder: Path) -> list[str]:
    """The prompts of an export of format `folder`, in the order of the file names of its records."""
    texts = [name for name in sorted(visible(folder)) if name.endswith(".txt")]
    return [(folder / name).read_text().removesuffix("\n") for name in texts]


def test_images_are_the_datasets_own_bytes_and_names_are_keys(dataset: Dataset, tmp_path: Path) -> None:
    done = export(dataset, str(tmp_path / "x"), Options("folder"))
    assert done == Exported(4, 4, 0)
    found = content(tmp_path / "x")
    for prompt in NAMES:
        key = key_of(dataset, prompt)
        assert found[f"{key}.png"] == image_of(dataset, prompt)
        assert found[f"{key}.txt"] == f"{prompt}\n".encode()
        facts = json.loads(found[f"{key}.json"])
        assert (facts["prompt"], facts["agreement_psnr"], facts["flags"]) == (prompt, 30.0, [])
        assert facts["made"]["key"] == key
        assert facts["width"] == (96 if prompt == WIDE else 64)
    assert len(visible(tmp_path / "x")) == 12


def test_rejected_samples_stay_out_unless_they_are_wanted(dataset: Dataset, tmp_path: Path) -> None:
    choose(dataset, "a boat", "rejected")
    choose(dataset, "a house", "kept", 5)
    export(dataset, str(tmp_path / "kept"), Options("folder"))
    assert sorted(names(tmp_path / "kept")) == ["a <b>cat</b>", "a house", "a tree"]
    facts = json.loads((tmp_path / "kept" / f"{key_of(dataset, 'a house')}.json").read_text())
    assert (facts["verdict"], facts["rating"]) == ("kept", 5)
    export(dataset, str(tmp_path / "all"), Options("folder", with_rejected=True))
    assert sorted(names(tmp_path / "all")) == sorted(NAMES)
    export(dataset, str(tmp_path / "where"), Options("folder", where="kept or prompt like '%boat'"))
    assert names(tmp_path / "where") == ["a house"]


def test_the_first_samples_come_first(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset, str(tmp_path / "x"), Options("imagefolder", limit=3))
    lines = (tmp_path / "x" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == NAMES[:3]


def test_where_no_sample_is_chosen_nothing_is_written(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", dataset.url, str(tmp_path / "x"), "--as", "folder", "--where", "agreement_psnr > 99"]
    assert main(words) == 1
    assert "no sample is chosen; nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ALL)
def test_the_same_again_writes_nothing_and_elsewhere_the_same_bytes(
    dataset: Dataset, tmp_path: Path, form: str
) -> None:
    options = Options(form, sizes=(None, 32))
    export(dataset, str(tmp_path / "one"), options)
    before = content(tmp_path / "one")
    written = Steps()
    with injected(written, str(tmp_path / "one")):
        assert export(dataset, str(tmp_path / "one"), options).written == 0
    assert written.seen == []
    (tmp_path / "one").rename(tmp_path / "kept")
    export(dataset, str(tmp_path / "one"), options)
    assert content(tmp_path / "one") == before == content(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "held_bytes"), [("folder", 1), ("mds", 1 << 20)])
def test_a_run_that_fails_anywhere_is_completed_by_the_next(
    tmp_path: Path, form: str, held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, as if nothing had happened."""
    monkeypatch.setattr("resmaster_stages.publish.exports.export.HELD_BYTES", held_bytes)
    dataset = built(tmp_path / "out", tmp_path, ["a house", "a tree", "a boat"])
    target, options = tmp_path / "x", Options(form, sizes=(None, 32))
    recorded = Steps()
    with injected(recorded, str(target)):
        export(dataset, str(target), options)
    expected = content(target)
    assert len(recorded.seen) > 60
    for number, at in enumerate(range(0, len(recorded.seen), 11)):
        target.rename(tmp_path / f"before{number}")
        with (
            pytest.raises((OSError, KeyboardInterrupt)),
            injected(Steps(at, (fail, interrupt)[number % 2]), str(target)),
        ):
            export(dataset, str(target), options)
        export(dataset, str(target), options)
        assert content(target) == expected, recorded.seen[at]


HALF = 23
"""The step at which half of the first image is written."""


def _killed(url: str, target: str, at: int) -> None:
    with injected(Steps(at, kill), target):
        export(open_dataset(url), target, Options("folder"))


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_half_of_a_file(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset, str(tmp_path / "whole"), Options("folder"))
    expected, target = content(tmp_path / "whole"), tmp_path / "x"
    half = 0
    for at in (HALF, HALF + 8):
        child = multiprocessing.get_context("spawn").Process(target=_killed, args=(dataset.url, str(target), at))
        child.start()
        child.join()
        assert child.exitcode == -9
        half += any(name.endswith(".tmp") for name in content(target))
        export(dataset, str(target), Options("folder"))
        assert content(target) == expected
        target.rename(tmp_path / f"killed{at}")
    assert half, "one of the kills struck inside a file"


def test_a_full_disk_is_one_line(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorded, target = Steps(), str(tmp_path / "x")
    with injected(recorded, target):
        export(dataset, target, Options("folder"))
    (tmp_path / "x").rename(tmp_path / "whole")
    at = next(number for number, step in enumerate(recorded.seen) if step.startswith("half of") and ".png" in step)
    words = ["export", dataset.url, target, "--as", "folder"]
    with injected(Steps(at, full), target):
        assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resmaster:")]
    assert "the disk is full; free some space, then run the same command again" in line
    assert main(words) == 0
    assert content(tmp_path / "x") == content(tmp_path / "whole")


@pytest.mark.parametrize("form", ALL)
def test_an_export_follows_its_dataset(dataset: Dataset, tmp_path: Path, form: str) -> None:
    """New samples come, rejected ones go, and what has not changed is not written again."""
    options, target = Options(form, sizes=(None, 32)), str(tmp_path / "x")
    export(dataset, target, options)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a new one", "and another"]) + "\n")
    dataset = ingest(dataset.config)
    make(dataset)
    choose(dataset, "a house", "rejected")
    done = export(dataset, target, options)
    assert (done.samples, done.written) == (5, 3), "two new samples, and the shard of the rejected one"
    assert bool(done.removed) == (form not in ("mds", "litdata")), "a packed shard is replaced"
    grown = content(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "grown")
    export(dataset, target, options)
    assert grown == content(tmp_path / "x")
    choose(dataset, "a new one", "rejected")
    choose(dataset, "and another", "rejected")
    done = export(dataset, target, options)
    assert (done.samples, done.written) == (3, 0)
    assert done.removed, "all of a shard"


def test_a_broken_run_and_a_choice_between_leave_nothing_behind(dataset: Dataset, tmp_path: Path) -> None:
    """Files that a broken run wrote, of samples that were rejected after it, are removed."""
    target, options = str(tmp_path / "x"), Options("folder")
    recorded = Steps()
    with injected(recorded, target):
        export(dataset, target, options)
    key = key_of(dataset, "a house")
    at = next(number for number, step in enumerate(recorded.seen) if step.startswith("after replace") and key in step)
    (tmp_path / "x").rename(tmp_path / "whole")
    with pytest.raises(OSError, match="Input/output error"), injected(Steps(at), target):
        export(dataset, target, options)
    assert any(key in name for name in visible(tmp_path / "x"))
    choose(dataset, "a house", "rejected")
    assert export(dataset, target, options).removed
    assert not any(key in name for name in visible(tmp_path / "x"))
    (tmp_path / "x").rename(tmp_path / "after")
    export(dataset, target, options)
    assert content(tmp_path / "x") == content(tmp_path / "after")


def test_a_broken_run_and_a_choice_that_is_taken_back_leave_the_first_files(dataset: Dataset, tmp_path: Path) -> None:
    """The broken run had written some files for the choice."""
    target, options = str(tmp_path / "x"), Options("folder")
    export(dataset, target, options)
    expected = {name: content(tmp_path / "x")[name] for name in visible(tmp_path / "x")}
    choose(dataset, "a house", "kept", 5)
    key = key_of(dataset, "a house")
    at = Steps()
    (tmp_path / "x").rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "x")
    with injected(at, target):
        export(dataset, target, options)
    step = next(n for n, said in enumerate(at.seen) if said.startswith("after replace") and f"{key}.json" in said)
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(tmp_path / "kept", tmp_path / "x")
    with pytest.raises(OSError, match="Input/output error"), injected(Steps(step), target):
        export(dataset, target, options)
    assert content(tmp_path / "x")[f"{key}.json"] != expected[f"{key}.json"]
    choose(dataset, "a house", "none")
    export(dataset, target, options)
    assert {name: content(tmp_path / "x")[name] for name in visible(tmp_path / "x")} == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "folder", "--where", "index < 3"], r"another --where \(none, now 'index < 3'\)"),
        (["--as", "folder", "--with-rejected"], r"another --with-rejected \(none, now given\)"),
        (["--as", "folder", "--sizes", "full,32"], r"another --sizes \(none, now 'full,32'\)"),
        (["--as", "folder", "--limit", "2"], r"another --limit \(none, now 2\)"),
        (["--as", "mds"], r"another --as \('folder', now 'mds'\)"),
    ],
)
def test_another_request_is_refused_and_changes_nothing(
    dataset: Dataset, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export(dataset, str(tmp_path / "x"), Options("folder"))
    before = content(tmp_path / "x")
    assert main(["export", dataset.url, str(tmp_path / "x"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)
    assert "choose another folder" in line
    assert content(tmp_path / "x") == before


def refused(dataset: Dataset, target: Path, said: str, options: Options | None = None) -> None:
    with pytest.raises(UserError, match=said) as error:
        export(dataset, str(target), options or Options("folder"))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_ours_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(dataset, tmp_path / "mine", "is not empty and holds no export; choose a new or empty folder")
    other = built(tmp_path / "other", tmp_path, name="other")
    export(other, str(tmp_path / "x"), Options("folder"))
    refused(dataset, tmp_path / "x", "holds an export of another dataset, 'other'")
    request = tmp_path / "x" / ".resmaster" / "request.json"
    request.write_text(request.read_text()[:-9])
    refused(other, tmp_path / "x", r"request.json: cannot be read .*; delete the export's folder")
    (tmp_path / "file").write_text("")
    refused(dataset, tmp_path / "file", "is a file")


def test_a_folder_in_the_dataset_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    inside = Path(dataset.url) / "exports"
    refused(dataset, inside, "lies in the dataset; choose a folder outside of")
    refused(dataset, Path(dataset.url), "lies in the dataset")
    (tmp_path / "link").symlink_to(dataset.url)
    refused(dataset, tmp_path / "link" / "x", "lies in the dataset")
    assert not inside.exists()


@pytest.mark.parametrize("where", ["agreement_psn > 3", "1=1; drop table manifest", "'"])
def test_a_wrong_expression_leaves_the_folder_alone(dataset: Dataset, tmp_path: Path, where: str) -> None:
    refused(dataset, tmp_path / "x", "cannot be asked|more than one expression", Options("folder", where))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--as", "imagefolde"], "did you mean 'imagefolder'?"),
        (["--as", "folder", "--limit", "0"], "give a number of at least 1"),
        (["--as", "folder", "--sizes", "1024,big"], "'big' is no size; give numbers from 16 to 65536 and full"),
        (["--as", "folder", "--sizes", ""], "'' is no size"),
        (["--as", "folder", "--sizes", "8"], "'8' is no size"),
        (["--as", "folder", "--sizes", "9" * 5000], "is no size"),
        ([], "--as"),
    ],
)
def test_wrong_words(
    dataset: Dataset, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:  # argparse ends the program by itself
        sys.exit(main(["export", dataset.url, str(tmp_path / "x"), *words]))
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_has_changed_since_it_was_published_is_said(dataset: Dataset, tmp_path: Path) -> None:
    """The manifest leads to a tar that no commit counts any more."""
    dataset.folder.remove(layout.commit("high_res", dataset.hashes["high_res"], 2))
    run_stage(dataset, "high_res", 2, process=FAKES["high_res"])
    refused(dataset, tmp_path / "x", "shard 000002 has changed since it was published; run: resmaster publish")
    nothing = ingest(parse_config({**dataset.config.model_dump(), "name": "nothing"}))
    refused(nothing, tmp_path / "y", "nothing is published yet")


def test_the_publication_is_exported_whatever_the_configuration_is_now(dataset: Dataset, tmp_path: Path) -> None:
    export(dataset, str(tmp_path / "before"), Options("fiftyone"))
    config = parse_config({**dataset.config.model_dump(), "upscale": {"method": "lanczos"}})
    changed = ingest(config)
    assert changed.hashes["high_res"] != dataset.hashes["high_res"]
    export(changed, str(tmp_path / "after"), Options("fiftyone"))
    assert visible(tmp_path / "after") == visible(tmp_path / "before")
    for name in visible(tmp_path / "after"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_dataset_without_captions(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "b"], tmp_path, upscale={"method": "direct"})
    for stage in dataset.hashes:
        run_stage(dataset, stage, 0, process=FAKES["low_res" if stage == "high_res" else stage])
    publish(dataset)
    export(dataset, str(tmp_path / "x"), Options("fiftyone"))
    found = json.loads((tmp_path / "x" / "samples.json").read_text())["samples"]
    assert [("captions" in sample, "low_res" in sample) for sample in found] == [(False, True)] * 2


def test_a_damaged_tar_is_named(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = rows_of(dataset)[0]["high_res_object"]
    data = bytearray(dataset.folder.read(name))
    data[700] ^= 1
    dataset.folder.write(name, bytes(data))
    assert main(["export", dataset.url, str(tmp_path / "x"), "--as", "folder"]) == 1
    assert f"{name} is damaged (sha256 differs); run: resmaster verify" in capsys.readouterr().err
    assert not any(name.endswith(".png") for name in content(tmp_path / "x"))


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_from_a_store_to_a_store(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("s3_root") if store == "s3" else f"memory://{uuid.uuid4().hex}"
    there, here = built(f"{root}/out", tmp_path), built(tmp_path / "out", tmp_path)
    for form in ("imagefolder", "mds", "kohya"):
        export(there, f"{root}/{form}", Options(form))
        export(here, str(tmp_path / form), Options(form))
        folder = open_root(f"{root}/{form}")
        expected = content(tmp_path / form)
        assert {file.name for file in folder.files()} == set(expected)
        for name in visible(tmp_path / form) - {"dataset.toml"}:
            assert folder.read(name) == expected[name]
        assert export(there, f"{root}/{form}", Options(form)).written == 0
        refused_inside = f"{there.url}/x"
        with pytest.raises(UserError, match="lies in the dataset"):
            export(there, refused_inside, Options(form))
    assert b'image_dir = "images"' in open_root(f"{root}/kohya").read("dataset.toml")


def test_smaller_copies_are_of_the_size_and_nothing_is_enlarged(dataset: Dataset, tmp_path: Path) -> None:
    done = export(dataset, str(tmp_path / "x"), Options("folder", sizes=(None, 32, 70)))
    assert done.notes == ("size 70: 3 images are smaller and stay as they are",)
    for prompt in NAMES:
        name = f"{key_of(dataset, prompt)}.png"
        whole = image_of(dataset, prompt)
        assert (tmp_path / "x" / "full" / name).read_bytes() == whole
        small = Image.open(tmp_path / "x" / "32" / name)
        assert small.size == ((39, 26) if prompt == WIDE else (32, 32))
        assert small.getextrema() == Image.open(io.BytesIO(whole)).getextrema(), "one colour stays one colour"
        middle = (tmp_path / "x" / "70" / name).read_bytes()
        assert (middle == whole) == (prompt != WIDE)
    facts = json.loads((tmp_path / "x" / "32" / f"{key_of(dataset, WIDE)}.json").read_text())
    assert (facts["width"], facts["height"]) == (39, 26)


@pytest.mark.parametrize(
    ("has", "size", "wanted"),
    [
        ((4096, 4096), 1024, (1024, 1024)),
        ((1024, 1024), 1024, (1024, 1024)),
        ((1000, 1000), 1024, (1000, 1000)),
        ((2304, 4096), 1024, (768, 1365)),
        ((10, 100_000), 16, (1, 1600)),
        ((64, 96), None, (64, 96)),
    ],
)
def test_a_size_is_that_of_a_square_with_as_many_px(
    has: tuple[int, int], size: int | None, wanted: tuple[int, int]
) -> None:
    assert fitted(*has, size) == wanted
    assert size is None or math.prod(wanted) <= max(size**2, wanted[1]) or wanted == has


def test_copies_are_lanczos_on_srgb_values() -> None:
    """By Pillow's own filter on bytes, up to its rounding between the two directions."""
    from resmaster_stages.dataset.sample import EncodedImage
    from resmaster_stages.publish.exports.sizes import copied

    noise = np.random.default_rng(1).integers(80, 176, (60, 90, 3), np.uint8)  # Lanczos reaches neither 0 nor 255
    image = Image.fromarray(noise)
    for form in ("png", "webp"):
        small = Image.open(io.BytesIO(copied(EncodedImage(encode_image(image, form), form, {}), 20, 30)))
        assert small.format == "PNG"
        expected = np.asarray(image.resize((30, 20), Image.Resampling.LANCZOS), int)
        assert np.abs(np.asarray(small, int) - expected).max() <= 1


def test_a_number_that_json_cannot_hold_is_null(dataset: Dataset, tmp_path: Path) -> None:
    rows = rows_of(dataset)
    rows[0]["agreement_psnr"], rows[1]["agreement_psnr"] = math.inf, math.nan
    dataset.folder.write(layout.MANIFEST, encode_table(rows, manifest_schema()))
    for form in ALL:
        export(dataset, str(tmp_path / form), Options(form))
    lines = (tmp_path / "imagefolder" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["agreement_psnr"] for line in lines] == [None, None, 30.0, 30.0]
