import json
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.plan import Plan, read_plan
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.schemas import manifest_schema
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish.card import Publication
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder
from resmaster_stages.storage.shards import read_index
from resmaster_stages.storage.tables import decode_table
from tests.fake_stages import EVERY_FAKE, FAKES, files_of, planned

PROMPTS = ["a", "b", "bad low_res", "bad high_res", "c"]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def build(root: str | Path, folder: Path, shards: list[int] | None = None, **values) -> Dataset:
    dataset = planned(root, PROMPTS, folder, **values)
    for shard in range(read_plan(dataset.folder).shards) if shards is None else shards:
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    return dataset


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_manifest_points_at_every_image(kind: str, tmp_path: Path) -> None:
    dataset = build(tmp_path if kind == "local" else f"memory://{uuid.uuid4().hex}", tmp_path)
    published = write_manifest(dataset)
    assert published == Publication(3, 3, 0, {"low_res": 1, "captions": 0, "high_res": 1, "quality": 0})
    rows = decode_table(dataset.folder.read("manifest.parquet"), manifest_schema(), "manifest").to_pylist()
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert [row["index"] for row in rows] == [0, 1, 4]
    for row in rows:
        for part in ("low_res", "high_res"):
            offset, size = row[f"{part}_offset"], row[f"{part}_bytes"]
            image = dataset.folder.read(row[f"{part}_object"])[offset : offset + size]
            assert image.startswith(b"\x89PNG")
            assert image.endswith(b"IEND\xaeB`\x82")
            assert row[f"{part}_member"] == f"{row['key']}.png"
        assert (row["width"], row["height"], row["agreement_psnr"], row["flags"]) == (64, 64, 30.0, [])
        assert dataset.folder.exists(row["captions_object"])


def test_index_follows_commits_and_names_no_empty_tar(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path)
    dataset.folder.write("high_res/000000-deadbeef.tar", b"leftover of an interrupted attempt")
    write_manifest(dataset)
    index = json.loads(dataset.folder.read("index.json"))
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert [shard["nsamples"] for shard in index["shardlist"]] == [2, 1]
    for shard in index["shardlist"]:
        path = tmp_path / "demo" / shard["url"]
        assert path.stat().st_size == shard["filesize"]
        with path.open("rb") as file:
            assert len(read_index(file, "x")) == shard["nsamples"]


def test_index_and_card_say_in_which_time_the_published_shards_were_made(tmp_path: Path) -> None:
    """The seconds of their commit records, without a price: an index is shared, and what somebody paid is not."""
    dataset = build(tmp_path / "out", tmp_path, dispatch={"price": 1e6})
    write_manifest(dataset)
    seconds = {
        stage: sum(receipt.seconds for receipt in dataset.commits(stage).read_all().values())
        for stage in dataset.hashes
    }
    assert all(seconds.values())
    index = json.loads(dataset.folder.read("index.json"))
    assert index["device_seconds"] == pytest.approx(seconds)
    assert index.keys() == {"__kind__", "wids_version", "name", "shardlist", "device_seconds"}
    told = f"| Computed in | {sum(seconds.values()):.1f} s of device time (by stage:"
    assert told in dataset.folder.read("README.md").decode()


def test_unfinished_shards_are_left_out_and_counted(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[0])
    run_stage(dataset, "low_res", 2, process=FAKES["low_res"])
    published = write_manifest(dataset)
    assert (published.samples, published.shards, published.shards_missing) == (2, 1, 2)
    assert "2 still missing" in dataset.folder.read("README.md").decode()


def test_nothing_finished_is_still_a_valid_publication(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[])
    assert write_manifest(dataset).samples == 0
    assert pq.read_table(tmp_path / "demo" / "manifest.parquet").num_rows == 0


def test_publishing_twice_gives_the_same_files(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path)
    names = (layout.MANIFEST, layout.INDEX, layout.CARD)
    write_manifest(dataset)
    first = [dataset.folder.read(name) for name in names]
    write_manifest(dataset)
    assert [dataset.folder.read(name) for name in names] == first


def test_without_captions(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[], upscale={"method": "direct"})
    for stage in ("low_res", "high_res", "quality"):
        process = FAKES["low_res"] if stage == "high_res" else FAKES[stage]
        run_stage(dataset, stage, 0, process=process)
    write_manifest(dataset)
    rows = pq.read_table(tmp_path / "demo" / "manifest.parquet").to_pylist()
    assert [row["captions_object"] for row in rows] == [None, None]
    assert "captions/" not in dataset.folder.read("README.md").decode()


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build(tmp_path, tmp_path, shards=[0])
    real = Plan.read
    monkeypatch.setattr(Plan, "read", lambda self, shard: [*real(self, shard), *(real(self, 0) if shard == 2 else [])])
    for stage in dataset.hashes:
        run_stage(dataset, stage, 2, process=FAKES[stage])
    with pytest.raises(ShardError, match=r"sample [0-9a-f]{24} occurs twice"):
        write_manifest(dataset)
    assert not dataset.folder.exists("manifest.parquet")


@pytest.mark.parametrize("stage", ["low_res", "high_res", "quality"])
def test_an_object_that_is_gone_is_named(tmp_path: Path, stage: str) -> None:
    dataset = build(tmp_path, tmp_path, shards=[0])
    (name,) = dataset.folder.names(stage)
    dataset.folder.remove(name)
    with pytest.raises(ShardError, match=f"{name} is gone; run: resmaster verify .*, then: resmaster repair"):
        write_manifest(dataset)


def test_the_cards_header_and_its_code_work(tmp_path: Path) -> None:
    """Both snippets of the card are run as they stand, in the dataset's folder."""
    dataset = build(tmp_path, tmp_path)
    write_manifest(dataset)
    card = dataset.folder.read("README.md").decode()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["size_categories"] == ["n<1K"]
    assert "| Samples | 3 |" in body
    assert "low_res: 1, captions: 0, high_res: 1, quality: 0" in body
    snippets = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(snippets) == 2
    probes = ["    print(image.size, prompt)\n", "        print(image.size, row['prompt'])\n"]
    for snippet, probe in zip(snippets, probes, strict=True):
        done = subprocess.run(
            [sys.executable, "-c", snippet + probe], capture_output=True, text=True, cwd=tmp_path / "demo"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split("\n")[:-1] == ["(64, 64) a", "(64, 64) b", "(64, 64) c"]


def licences(dataset: Dataset) -> dict[str, str]:
    """Part -> licence, by the table of the card."""
    card = dataset.folder.read("README.md").decode()
    return dict(re.findall(r"^\| (base model|VAE|IP-Adapter|captioner) \| `.*` \| (.*) \|$", card, re.MULTILINE))


def test_the_card_states_the_licences_of_the_models(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[])
    write_manifest(dataset)
    assert licences(dataset) == {"base model": "apache-2.0", "captioner": "apache-2.0"}

    model = tmp_path / "model"
    model.mkdir()
    for card, stated in (
        (b"---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0, which does not allow commercial use of the model"),
        (b"---\nlicense: [x | y](https://example.org)\n---\n", "not stated; read the model's page"),
        (b"---\nlicense: \xff", "not stated; read the model's page"),
    ):
        (model / "README.md").write_bytes(card)
        other = replace(dataset, config=dataset.config.model_copy(update={"model": ModelConfig(id=str(model))}))
        write_manifest(other)
        assert licences(other)["base model"] == stated


def test_a_dataset_without_a_base_model_names_none(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[])
    config = parse_config({**dataset.config.model_dump(), "upscale": {"method": "lanczos"}})
    for images, named in (("my-images", False), (None, True)):
        some = replace(dataset, config=config.model_copy(update={"images": images}))
        write_manifest(some)
        card = some.folder.read("README.md").decode()
        assert ("Licences of the models" in card) is named
        assert ("picturebook" in card) is named
        assert "| Upscaled by | `lanczos`, scale 4 |" in card


def configs(dataset: Dataset) -> dict[str, list[str]]:
    """Name of a configuration -> its files, by the header of the card as dataset hubs read it."""
    header = yaml.safe_load(dataset.folder.read("README.md").decode().split("---\n")[1])
    found = header.get("configs", [])
    assert [config["config_name"] for config in found if config.get("default")] == ["high_res"][: len(found)]
    splits = {config["config_name"]: config["data_files"] for config in found}
    assert all([part["split"] for part in parts] == ["train"] for parts in splits.values())
    return {name: part["path"] for name, (part,) in splits.items()}


def test_the_card_tells_dataset_hubs_which_tars_are_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers, tars of replaced attempts and tars without a sample lie in the same folders."""
    dataset = build(tmp_path, tmp_path)
    dataset.folder.write("high_res/000000-deadbeef.tar", b"leftover of an interrupted attempt")
    dataset.folder.write("low_res/000000-deadbeef.tar", b"leftover of an interrupted attempt")
    write_manifest(dataset)
    rows = pq.read_table(tmp_path / "demo" / "manifest.parquet").to_pylist()
    index = json.loads(dataset.folder.read("index.json"))["shardlist"]
    assert configs(dataset) == {
        "high_res": [shard["url"] for shard in index],
        "low_res": [receipt.objects[0].name for receipt in dataset.commits("low_res").read_all().values()],
    }
    assert {row["low_res_object"] for row in rows} <= set(configs(dataset)["low_res"])
    monkeypatch.setattr("resmaster_stages.publish.card.LISTED_TARS", 2)
    write_manifest(dataset)
    assert configs(dataset) == {"high_res": [shard["url"] for shard in index], "low_res": ["low_res/*.tar"]}


def test_the_card_of_nothing_has_no_configurations(tmp_path: Path) -> None:
    dataset = build(tmp_path, tmp_path, shards=[])
    write_manifest(dataset)
    assert configs(dataset) == {}
    assert "empty_check=False" in dataset.folder.read("README.md").decode()


def test_all_stages_are_covered() -> None:
    assert list(EVERY_FAKE) == list(STAGES)


def test_tars_are_not_opened_for_records_tell_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build(tmp_path, tmp_path)
    opened: list[str] = []
    real = Folder.open
    monkeypatch.setattr(Folder, "open", lambda folder, name: opened.append(name) or real(folder, name))
    write_manifest(dataset)
    assert opened == []
    for stage in dataset.hashes:
        for receipt in dataset.commits(stage).read_all().values():
            assert len(receipt.images) == (receipt.samples_ok if stage in ("low_res", "high_res") else 0)


def test_near_duplicates_are_flagged_over_the_whole_dataset(tmp_path: Path) -> None:
    """In the manifest alone, which knows all of it: the quality tables stay as they are.

    Blank images are no duplicates.
    """
    looks = {"a": ("0" * 16, []), "b": ("1" * 16, []), "c": ("0" * 16, ["seam"]), "d": ("2" * 16, ["blank"])}

    def quality(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample, output in zip(samples, FAKES["quality"](config, samples), strict=True):
            phash, flags = looks[sample.prompt[0]]
            yield replace(output, rows=[{**output.rows[0], "phash": phash, "flags": flags}])

    dataset = planned(tmp_path, ["a", "b", "c", "d", "d again", "b again"], tmp_path)
    for shard in range(3):
        for stage in dataset.hashes:
            run_stage(dataset, stage, shard, process=quality if stage == "quality" else FAKES[stage])
    write_manifest(dataset)
    rows = pq.read_table(tmp_path / "demo" / "manifest.parquet").to_pylist()
    assert [row["flags"] for row in rows] == [
        [],
        [],
        ["seam", "near_duplicate"],
        ["blank"],
        ["blank"],
        ["near_duplicate"],
    ]
    tables = [receipt.objects[0].name for receipt in dataset.commits("quality").read_all().values()]
    kept = [row["flags"] for name in tables for row in pq.read_table(tmp_path / "demo" / name).to_pylist()]
    assert kept == [[], [], ["seam"], ["blank"], ["blank"], []]


def test_a_later_attempt_is_all_that_readers_see_of_its_shard(tmp_path: Path) -> None:
    """With the sample that became good in its place, and the bytes of the others as they were."""
    dataset = build(tmp_path, tmp_path)
    write_manifest(dataset)
    before = {row["key"]: row for row in pq.read_table(tmp_path / "demo" / "manifest.parquet").to_pylist()}
    superseded = {
        stored.name
        for stage in dataset.hashes
        for receipt in [dataset.commits(stage).read(1)]
        if receipt
        for stored in receipt.objects
    }

    def mended(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            yield Output(sample.key, files=files_of(sample, 16))

    for stage in dataset.hashes:
        run_stage(dataset, stage, 1, number=2, process=mended if stage == "low_res" else FAKES[stage])
    published = write_manifest(dataset)
    assert published == Publication(4, 3, 0, {"low_res": 0, "captions": 0, "high_res": 1, "quality": 0})
    rows = pq.read_table(tmp_path / "demo" / "manifest.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["a", "b", "bad low_res", "c"]
    assert [row for row in rows if row["shard"] != 1] == list(before.values())
    (row,) = (row for row in rows if row["shard"] == 1)
    assert not superseded & {row[name] for name in ("low_res_object", "captions_object", "high_res_object")}
    index = json.loads(dataset.folder.read("index.json"))["shardlist"]
    assert [shard["url"] for shard in index] == [
        rows[0]["high_res_object"],
        row["high_res_object"],
        rows[3]["high_res_object"],
    ]


@pytest.mark.parametrize(
    ("change", "said"), [("x", "damaged commit record"), (None, "of other samples than the plan's")]
)
def test_places_that_do_not_fit_are_refused(tmp_path: Path, change: str | None, said: str) -> None:
    dataset = build(tmp_path, tmp_path, shards=[0])
    (path,) = (tmp_path / "demo" / "commits").glob("high_res-*/*.json")
    record = json.loads(unsigned(path.read_bytes()))
    record["images"] = [change, *record["images"][1:]] if change else record["images"][1:]
    path.write_bytes(signed(record, indent=1))
    with pytest.raises(ShardError, match=said):
        write_manifest(dataset)
