"""Detail masks in datasets: from a column of the prompts, or beside the user's images, to the engine, sample by
sample."""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages import high_res, low_res
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.commit import Receipt
from resmaster_stages.dataset.dataset import Dataset, find_dataset, open_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.dataset.reading import shard_samples
from resmaster_stages.dataset.sample import Sample
from resmaster_stages.diffusion.cost import UnetCost
from resmaster_stages.errors import ConfigError, PlanError, SampleError
from resmaster_stages.inspection.explain import explain, spelled
from resmaster_stages.keys import masked_key, prompt_key, sample_seed
from resmaster_stages.methods.direct import Direct
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models import load
from resmaster_stages.models.bases.base import Geometry
from resmaster_stages.models.identity import Weights
from resmaster_stages.models.parts import Models
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.prompts import ingest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage import masks, sources
from resmaster_stages.storage.filesystem import Folder
from tests.fake_stages import UNREAD
from tests.storage.test_images import encoded, tar_of
from tests.tiny_models import make_pipeline

FREESCALE = {
    "method": "freescale",
    "steps": 3,
    "scale": 2,
    "start": 0.0,
    "alpha": 3.0,
    "alpha_elsewhere": 0.5,
}
SIZE = (64, 64)
LEFT = Image.new("L", (10, 8))
LEFT.paste(255, (0, 0, 5, 8))
RIGHT = LEFT.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((7, 5))


def config_of(root: Path, **values: Any) -> DatasetConfig:
    return parse_config(
        {
            "name": "demo",
            "root": str(root),
            "model": {"id": "tiny"},
            "low_res": {"height": 64, "width": 64, "steps": 2},
            "image_format": "png",
            "spill_seconds": 0,
            "upscale": FREESCALE,
            **values,
        }
    )


def png(image: Image.Image) -> bytes:
    return encoded(image, "PNG")


def masked_prompts(folder: Path, suffix: str = ".jsonl") -> Path:
    """Prompts with a left, no, and a right mask: in files beside them, or (`.bytes.parquet`) in the table itself."""
    folder.mkdir(exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "masks" / "left.png").write_bytes(png(LEFT))
    (folder / "right.png").write_bytes(png(RIGHT))
    names = ["masks/left.png", None, "right.png"]
    path = folder / f"prompts{suffix}"
    rows: list[dict[str, Any]] = [{"prompt": "a cat", "detail_mask": name} for name in names]
    if suffix == ".csv":
        path.write_text("prompt,detail_mask\n" + "".join(f"a cat,{name or ''}\n" for name in names))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        if suffix == ".bytes.parquet":
            rows = [{**row, "detail_mask": name and (folder / name).read_bytes()} for row, name in zip(rows, names)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.fixture(autouse=True)
def geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny model, which has no files to read it from."""
    monkeypatch.setattr("resmaster_stages.planning.checks.geometry_of", lambda model: Geometry(64, 4))
    monkeypatch.setattr("resmaster_stages.planning.checks.family_of", lambda model: UNREAD)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Models:
    """A tiny model, which the stages load whatever the configuration says."""
    models = Models.from_pipeline(make_pipeline(), identity="tiny@1")
    monkeypatch.setattr(load, "load_models", lambda config: models)
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights("tiny@1"))
    return models


def built(config: DatasetConfig, *stages: str) -> tuple[Dataset, Receipt]:
    """The dataset with its one shard committed, and the last receipt."""
    dataset = ingest(config)
    return dataset, [run_stage(dataset, stage, 0) for stage in stages][-1]


def samples_of(dataset: Dataset) -> list[Sample]:
    with shard_samples(dataset, 0, ["low_res", "high_res"]) as samples:
        return list(samples)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".bytes.parquet"])
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, suffix: str) -> None:
    path = masked_prompts(tmp_path, suffix)
    draft = draft_samples(config_of(tmp_path, prompts=str(path), replicas=2))
    assert (draft.rejected, draft.duplicates) == ((), ())
    plain = [prompt_key("a cat", "", 64, 64, replica) for replica in (0, 1)]
    expected = [masked_key(key, png(LEFT)) for key in plain] + plain + [masked_key(key, png(RIGHT)) for key in plain]
    assert [sample.key for sample in draft.samples] == expected
    left, _, none, _, right, _ = (sample.source for sample in draft.samples)
    assert none is None
    assert left
    assert right
    assert [masks.read_mask(left), masks.read_mask(right)] == [png(LEFT), png(RIGHT)]
    if suffix == ".bytes.parquet":
        assert (left, right) == (f"{path}#1", f"{path}#3")
    else:
        assert (left, right) == (str(tmp_path / "masks" / "left.png"), str(tmp_path / "right.png"))


def test_masks_are_found_beside_relative_and_remote_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    path = masked_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    (first, *_) = draft_samples(config_of(tmp_path, prompts=path.name)).samples
    assert first.source == str(tmp_path / "masks" / "left.png")
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path), "/masked-prompts", recursive=True)
    (remote, *_) = draft_samples(config_of(tmp_path, prompts="memory://masked-prompts/prompts.jsonl")).samples
    assert remote.source
    assert remote.source.startswith("memory://")
    assert masks.read_mask(remote.source) == png(LEFT)
    assert remote.key == first.key


def test_a_column_without_masks_changes_no_byte_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na cat\na dog\n")
    (tmp_path / "b.csv").write_text("prompt,detail_mask\na cat,\na dog,\n")
    stored = []
    for name in ("a", "b"):
        config = config_of(tmp_path / name, prompts=str(tmp_path / f"{name}.csv"), upscale={"method": "resmaster"})
        dataset = ingest(config)
        (part,) = dataset.plan.generations[0].parts
        stored.append((part.stored.sha256, part.stored.bytes))
        assert [sample.source for sample in read_plan(dataset.folder).read(0)] == [None, None]
    assert stored[0] == stored[1]


def test_bad_masks_cost_their_row_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    masked_prompts(folder)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(LEFT))
    (folder / "link.png").symlink_to(secret)
    (folder / "text.png").write_text("no image")
    (folder / "dir.png").mkdir()
    Image.new("F", (4, 4)).save(folder / "deep.tif")
    os.mkfifo(folder / "pipe.png")
    (folder / "closed.png").write_bytes(png(LEFT))
    read = Folder.read

    def read_unless_closed(place: Folder, name: str) -> bytes:
        if name == "closed.png":
            raise PermissionError(13, "Permission denied", name)
        return read(place, name)

    monkeypatch.setattr(Folder, "read", read_unless_closed)
    (folder / "bomb.png").write_bytes(png(Image.new("1", (400, 400))))
    (folder / "huge.png").write_bytes(png(LEFT) + bytes(6000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr(masks, "MAX_FILE_BYTES", 5000)
    bad: dict[Any, str] = {
        "../secret.png": "leads out of the prompts file's folder",
        "masks/../../secret.png": "leads out of the prompts file's folder",
        str(secret): "leads out of the prompts file's folder",
        f"file://{secret}": "leads out of the prompts file's folder",
        "link.png": "is a link that leads out of the folder",
        "gone.png": "no such file",
        "dir.png": "no such file",
        "pipe.png": "no such file",
        "closed.png": "permission denied; check who may read the file",
        "right.png/a.png": "no such file",
        "x" * 300 + ".png": "no such file",
        "mask.svg": "unknown kind of image",
        "a\u0007.png": "control characters",
        "text.png": "not a readable image",
        "deep.tif": "scale them to 8 or 16 bits",
        "bomb.png": "too many pixels",
        "huge.png": "more than 5,000",
        7: "not the name of a file",
    }
    path = folder / "bad.jsonl"
    rows = [{"prompt": "a cat", "detail_mask": value} for value in [*bad, "right.png"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft = draft_samples(config_of(tmp_path, prompts=str(path)))
    assert [sample.source for sample in draft.samples] == [str(folder / "right.png")]
    reasons = [rejected.reason for rejected in draft.rejected]
    assert len(reasons) == len(bad)
    for reason, (name, expected) in zip(reasons, bad.items()):
        named = "" if name == 7 else name.replace("\a", r"\x07")[:80]
        assert reason.startswith(f"its detail mask: {named}")
        assert expected in reason
    table = pa.table({"prompt": ["a", "b", "c"], "detail_mask": [bytes(6000), b"", png(LEFT)]})
    pq.write_table(table, folder / "bad.parquet")
    draft = draft_samples(config_of(tmp_path, prompts=str(folder / "bad.parquet")))
    assert [sample.prompt for sample in draft.samples] == ["c"]
    assert "more than 5,000" in draft.rejected[0].reason


def test_masks_that_nothing_reads_are_one_error_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(RIGHT))
    (tmp_path / "images" / "a.detail_mask.png").write_bytes(png(LEFT))
    sources = {"prompts": str(masked_prompts(tmp_path / "in"))}, {"images": str(tmp_path / "images")}
    for number, source in enumerate(sources):
        for part in ({"method": "resmaster"}, {"method": "super_resolution"}, {"method": "freescale"}):
            config = config_of(tmp_path / f"{number}-{part['method']}", **source, upscale=part)
            with pytest.raises(ConfigError, match=r"detail mask, which only method freescale .* leave the mask out"):
                ingest(config)
            assert find_dataset(config) is None


@pytest.mark.parametrize("packed", [False, True])
def test_masks_beside_your_images(tmp_path: Path, packed: bool, loaded: Models) -> None:
    """In a folder and in a tar: a's mask, b's none, and one that belongs to no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    image, mask = png(Image.new("RGB", SIZE, "red")), png(LEFT)
    files = {"a.png": image, "a.txt": b"a cat", "a.detail_mask.png": mask, "b.png": image, "b.txt": b"a cat"}
    if packed:
        tar_of(folder / "all.tar", files)
    else:
        for name, data in {**files, "lost.detail_mask.png": mask}.items():
            (folder / name).write_bytes(data)
    config = config_of(tmp_path, images=str(folder))
    draft = draft_samples(config)
    assert [str(rejected.reason) for rejected in draft.rejected] == (
        [] if packed else ["a detail mask without its image; the mask of a.png is called a.detail_mask.png"]
    )
    a, b = draft.samples
    assert a.key == masked_key(b.key, mask)
    dataset, _ = built(config, "low_res", "high_res")
    with_mask, without = samples_of(dataset)
    assert with_mask.low_res
    assert without.low_res
    assert with_mask.detail_mask
    assert with_mask.low_res.data == without.low_res.data
    assert with_mask.detail_mask.open().tobytes() == LEFT.convert("RGB").tobytes()
    assert without.detail_mask is None
    again = draft_samples(config_of(tmp_path / "again", images=str(folder)))
    assert again.samples == draft.samples


def test_a_mask_of_16_bits_keeps_its_values(tmp_path: Path, loaded: Models) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(Image.new("RGB", SIZE, "red")))
    (tmp_path / "in" / "a.detail_mask.png").write_bytes(png(Image.fromarray(levels * 257)))
    dataset, _ = built(config_of(tmp_path, images=str(tmp_path / "in")), "low_res", "high_res")
    (sample,) = samples_of(dataset)
    assert sample.detail_mask
    assert (np.asarray(sample.detail_mask.open())[..., 0] == levels).all()


def test_a_mask_that_changes_or_goes_costs_its_sample_and_a_new_plan_takes_the_new_one(
    tmp_path: Path, loaded: Models
) -> None:
    config = config_of(tmp_path, prompts=str(masked_prompts(tmp_path)))
    ingest(config)
    planned = read_plan(open_dataset(config.root).folder).read(0)
    asked = [
        Sample(s.key, s.index, s.prompt, s.negative_prompt, s.height, s.width, s.replica, s.source) for s in planned
    ]
    (tmp_path / "right.png").write_bytes(png(LEFT.rotate(90)))
    (tmp_path / "masks" / "left.png").unlink()
    gone, fine, changed = (output.finished() for output in low_res.process(config, asked))
    assert fine.error is None
    assert isinstance(gone.error, SampleError)
    assert "gone or cannot be read" in str(gone.error)
    assert "changed since it was planned" in str(changed.error)
    draft = draft_samples(config)
    assert len(draft.samples) == 2
    assert draft.samples[1].key not in {sample.key for sample in planned}

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(RIGHT))
    (folder / "a.detail_mask.png").write_bytes(png(LEFT))
    own = config_of(tmp_path, images=str(folder))
    (spec,) = draft_samples(own).samples
    sample = replace(asked[0], key=spec.key, prompt="", source=spec.source)
    (folder / "a.detail_mask.png").unlink()
    (output,) = low_res.process(own, [sample])
    assert "or its detail mask is gone" in str(output.error)


@pytest.mark.parametrize("suffix", [".jsonl", ".bytes.parquet"])
def test_each_sample_gets_what_upscale_image_makes_with_its_mask(tmp_path: Path, suffix: str, loaded: Models) -> None:
    """From the dataset alone: prompts and masks are gone, and it lies elsewhere, when high_res begins."""
    config = config_of(tmp_path / "out", prompts=str(masked_prompts(tmp_path / "in", suffix)))
    built(config, "low_res")
    shutil.rmtree(tmp_path / "in")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    dataset = open_dataset(str(tmp_path / "moved"))
    run_stage(dataset, "high_res", 0)
    samples = samples_of(dataset)
    assert len({sample.low_res.data for sample in samples if sample.low_res}) == 1  # what the masks are drawn for
    results = []
    for sample, mask in zip(samples, (LEFT, None, RIGHT)):
        assert sample.low_res
        assert sample.high_res
        expected = upscale_image(
            loaded,
            sample.low_res.open(),
            "a cat",
            config=config.upscale,
            detail=mask,
            seed=sample_seed(sample.key, 0, "high_res"),
        )
        results.append(sample.high_res.open().tobytes())
        assert results[-1] == expected.tobytes()
        assert ("detail_mask" in sample.high_res.meta) == (mask is not None)
    assert len(set(results)) == 3


def test_the_mask_itself_makes_the_difference(tmp_path: Path, loaded: Models) -> None:
    """The same sample, seed and all, with the other mask: another image."""
    dataset, _ = built(config_of(tmp_path, prompts=str(masked_prompts(tmp_path))), "low_res", "high_res")
    left, none, right = samples_of(dataset)
    images = {
        next(high_res.process(dataset.config, [replace(left, detail_mask=mask)])).finished().files["png"]
        for mask in (left.detail_mask, right.detail_mask, none.detail_mask)
    }
    assert len(images) == 3
    other = dataset.config.model_copy(update={"upscale": Direct()})
    with pytest.raises(ConfigError, match=f"sample {left.key} has a detail mask"):
        next(high_res.process(other, [left]))


@pytest.mark.parametrize("stage", ["low_res", "high_res"])
def test_a_resumed_shard_has_the_bytes_of_an_uninterrupted_one(tmp_path: Path, stage: str, loaded: Models) -> None:
    prompts = str(masked_prompts(tmp_path))
    _, whole = built(
        config_of(tmp_path / "whole", prompts=prompts), *(["low_res", "high_res"][: 1 + (stage == "high_res")])
    )  # type: ignore[arg-type]
    config = config_of(tmp_path / "broken", prompts=prompts, low_res={"height": 64, "width": 64, "steps": 2})
    dataset = ingest(config)
    if stage == "high_res":
        run_stage(dataset, "low_res", 0)
    process: Callable[..., Any] = {"low_res": low_res, "high_res": high_res}[stage].process
    done: list[str] = []

    def breaks_off(config: DatasetConfig, samples: Any) -> Any:
        for output in process(config, samples):
            if len(done) == 2:
                raise PlanError("broken off")
            done.append(output.key)
            yield output

    with pytest.raises(PlanError, match="broken off"):
        run_stage(dataset, stage, 0, process=breaks_off)
    receipt = run_stage(dataset, stage, 0)
    assert [(o.sha256, o.bytes) for o in receipt.objects] == [(o.sha256, o.bytes) for o in whole.objects]
    if stage == "high_res":
        cost = UnetCost(**receipt.provenance["unet"])
        assert 0 < cost.calls < UnetCost(**whole.provenance["unet"]).calls  # what was done was kept


def test_explain_shows_mask_file_and_seeds(tmp_path: Path, loaded: Models) -> None:
    dataset, _ = built(config_of(tmp_path, prompts=str(masked_prompts(tmp_path))), "low_res", "high_res")
    left = read_plan(dataset.folder).read(0)[0]
    found = explain(dataset, left.key)
    text = spelled(found)
    assert f"source      {tmp_path / 'masks' / 'left.png'}" in text
    assert f"{left.key}.detail_mask.png" in text
    assert found.stages[0].facts["detail_mask"]["width"] == 10
    assert "detail_mask {" in text
    assert found.seeds["low_res"] == found.stages[0].facts["seed"]
    assert found.seeds["high_res"] == found.stages[1].facts["seed"]
    member = next(place for place in found.stages[0].files if place.member.endswith(".detail_mask.png"))
    data = Path(member.url).read_bytes()[member.offset : member.offset + member.size]
    assert Image.open(io.BytesIO(data)).tobytes() == LEFT.tobytes()


def test_masks_beside_images_are_not_read_through_links_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(LEFT))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(RIGHT))
    (folder / "a.detail_mask.png").symlink_to("../secret.png")
    (found,) = sources.find_images(str(folder))
    assert "a.detail_mask.png is a link that leads out of the folder" in found.problem
    assert found.mask is None


def test_a_mask_that_the_method_does_not_read_is_refused_by_upscale_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--detail-mask", str(tmp_path / "a.png")]
    for method in ("super_resolution", "resmaster"):
        assert main([*words, "--method", method]) == 2
        assert capsys.readouterr().err.startswith(
            "resmaster: --detail-mask gives a detail mask, which only method freescale"
        )
    assert not (tmp_path / "b.png").exists()
