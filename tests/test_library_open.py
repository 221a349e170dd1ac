"""`rm.open`: finished samples by key and in order, in a folder and in a bucket."""

from pathlib import Path

import pytest

import resmaster_stages as rm
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.runner.run import run_stage
from tests.durability.injection import PROMPTS, build
from tests.fake_stages import FAKES, config_at, planned


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    build(str(tmp_path / "out"), str(tmp_path / "prompts.txt"))
    return str(tmp_path / "out")


def test_iteration_gives_the_finished_samples_with_images_and_metrics(url: str) -> None:
    dataset = rm.open(url)
    found = list(dataset)
    assert [sample.prompt for sample in found] == ["a", "b"]
    assert len(dataset) == 2
    assert dataset.config.samples_per_shard == 2
    for sample in found:
        assert sample.low_res.open().size < sample.high_res.open().size
        assert sample.captions
        assert sample.metrics["agreement_psnr"] is not None
        assert "key" not in sample.metrics


def test_a_sample_is_found_by_its_key_or_a_beginning(url: str) -> None:
    dataset = rm.open(url)
    for sample in dataset:
        for key in (sample.key, sample.key[:8], f" {sample.key.upper()} "):
            assert dataset[key] == sample
        assert dataset.explain(sample.key[:8]).sample.key == sample.key
    assert [stage.committed for stage in dataset.status().stages] == [2] * len(dataset.dataset.hashes)


def test_what_is_no_finished_sample_is_a_key_error_of_one_line(url: str) -> None:
    dataset = rm.open(url)
    failed = next(
        sample.key for sample in dataset.dataset.plan.read(0) if sample.key not in {each.key for each in dataset}
    )
    cases = {
        failed: f"sample {failed} is planned, but not finished; explain('{failed}') says why",
        "0123456789abcdef": "no sample's key begins with 0123456789abcdef",
        "red house": "'red house' is no key",
        0: "a key is a text, not int; list(dataset) gives the samples by number",
    }
    for key, message in cases.items():
        with pytest.raises(KeyError) as raised:
            dataset[key]  # type: ignore[index]
        assert isinstance(raised.value, UserError)
        assert message in str(raised.value)
        assert str(raised.value)[0] != '"'
    assert dataset.explain(failed).sample.key == failed
    with pytest.raises(KeyError, match="no sample's key begins"):
        dataset.explain("0123456789abcdef")


def test_two_keys_with_one_beginning_are_told(tmp_path: Path) -> None:
    own = planned(tmp_path / "out", [f"prompt {number}" for number in range(17)], tmp_path)
    dataset, keys = rm.open(own.url), list(own.plan.keys())
    digit = next(key[0] for key in keys if sum(other[0] == key[0] for other in keys) > 1)
    with pytest.raises(KeyError, match=f"keys begin with {digit} "):
        dataset[digit]
    assert len(dataset) == 0
    assert list(dataset) == []


def test_what_is_finished_while_the_dataset_is_open_is_found(tmp_path: Path) -> None:
    own = planned(tmp_path / "out", PROMPTS.splitlines(), tmp_path)
    dataset = rm.open(own.url)
    assert len(dataset) == 0
    for stage, process in FAKES.items():
        assert list(dataset) == []
        run_stage(own, stage, 0, process=process)
    assert [sample.prompt for sample in dataset] == ["a"]
    assert len(dataset) == 1


def test_a_damaged_object_or_record_is_told_and_not_skipped(url: str) -> None:
    dataset = open_dataset(url)
    receipt = dataset.commits("high_res").read(0)
    assert receipt is not None
    name = receipt.objects[0].name
    path = Path(url, name) if Path(url, name).exists() else Path(dataset.url, name)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match="sha256 differs"):
        list(rm.open(url))
    record = next(Path(dataset.url, "commits").glob("quality-*/000001.json"))
    record.chmod(0o644)
    record.write_text("{")
    with pytest.raises(ShardError, match="000001"):
        len(rm.open(url))


@pytest.mark.s3
def test_a_dataset_in_a_bucket_is_opened_alike(s3_root: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    build(s3_root, str(tmp_path / "prompts.txt"))
    (tmp_path / "here").mkdir()
    build(str(tmp_path / "here"), str(tmp_path / "prompts.txt"))
    there, here = rm.open(f"{s3_root}/{config_at('x').name}"), rm.open(str(tmp_path / "here"))
    assert there.url.startswith("s3://")
    assert [(each.key, each.high_res.data) for each in there] == [(each.key, each.high_res.data) for each in here]
    key = next(iter(here)).key
    assert there[key[:10]].low_res.data == here[key[:10]].low_res.data
    assert len(there) == 2
