"""`resmaster explain`: everything about a sample, and commands that fetch its very bytes."""

import io
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import ConfigError, GpuLost, ShardError, UserError
from resmaster_stages.inspection.explain import (
    Explanation,
    explain,
    explain_shard,
    fetch_command,
    find_sample,
    shard_of,
    spelled,
)
from resmaster_stages.keys import sample_seed
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.shards import Member
from tests.fake_stages import FAKES, files_of, planned


def built(root: str | Path, prompts: list[str], folder: Path) -> Dataset:
    """A dataset with every stage of every shard done, as far as the prompts let it."""
    dataset = planned(root, prompts, folder)
    for shard in range(dataset.plan.shards):
        for stage, process in FAKES.items():
            try:
                run_stage(dataset, stage, shard, process=process)
            except ShardError:
                break
    return dataset


def key_of(dataset: Dataset, index: int) -> str:
    plan = dataset.plan
    return next(s.key for shard in range(plan.shards) for s in plan.read(shard) if s.index == index)


def states(explanation: Explanation) -> list[str]:
    return [trace.state for trace in explanation.stages]


def test_a_finished_sample(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a house", "a tree", "a boat"], tmp_path)
    key = key_of(dataset, 2)
    found = explain(dataset, key)
    assert (found.sample.prompt, found.sample.index, found.sample.shard) == ("a boat", 2, 1)
    assert found.seeds == {stage: sample_seed(key, 0, stage) for stage in ("low_res", "high_res")}
    assert found.models["model"].startswith("picturebook@")
    assert states(found) == ["committed"] * 4
    low_res, captions, high_res, quality = found.stages
    assert high_res.facts == {"key": key, "size": 64}
    assert [(row["row"], row["col"]) for row in captions.rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert quality.rows[0]["agreement_psnr"] == 30.0
    assert [place.member for place in low_res.files] == [f"{key}.png", f"{key}.json", f"{key}.txt"]
    for trace in found.stages:
        assert Path(trace.commit).is_file()
        assert trace.receipt is not None
        assert trace.receipt.samples_ok == 1
    text = spelled(found)
    for part in (key, "a boat", "patch     0,1", high_res.files[0].fetch, "agreement_psnr 30", found.models["model"]):
        assert part in text
    assert "fit" not in text, "the stand-in checks no captions"
    captions.rows[1].update(status="replaced", truncated=True, fit=41.26)
    assert "a boat (replaced, shortened, fit 41.3)" in spelled(found)


def test_the_commands_fetch_the_files(tmp_path: Path) -> None:
    """From a folder whose name a shell would trip over."""
    dataset = built(tmp_path / "my $HOME's data", ["a house", "a tree"], tmp_path)
    key = key_of(dataset, 1)
    target = tmp_path / "fetched"
    target.mkdir()
    for place in explain(dataset, key).stages[2].files:
        subprocess.run(["bash", "-c", place.fetch], cwd=target, check=True)
    assert Image.open(target / f"{key}.png").size == (64, 64)
    assert json.loads((target / f"{key}.json").read_text())["key"] == key
    assert (target / f"{key}.txt").read_text() == "a tree"


def test_the_idle_share_is_shown_where_the_record_has_it(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a tree"], tmp_path)
    key = key_of(dataset, 0)
    assert spelled(explain(dataset, key)).count("device idle 100% of it") == 4  # the stand-ins need no device
    for path in (tmp_path / "out").glob("**/commits/high_res-*/*.json"):
        record = json.loads(unsigned(path.read_bytes()))
        del record["provenance"]["device"]
        path.write_bytes(signed(record, indent=1))
    assert spelled(explain(dataset, key)).count("device idle") == 3


def test_a_store_that_breaks_off_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = built(tmp_path / "out", ["a tree"], tmp_path)

    class Torn(io.BytesIO):
        def read(self, *size: int | None) -> bytes:
            raise type("ClientPayloadError", (Exception,), {"__module__": "aiohttp"})("not completed")

    monkeypatch.setattr(Folder, "open", lambda *_: Torn())
    assert main(["explain", dataset.url, key_of(dataset, 0)]) == 1
    assert "cannot be reached (not completed)" in " ".join(capsys.readouterr().err.split())


def test_how_objects_elsewhere_are_fetched() -> None:
    class Bucket:
        def unstrip_protocol(self, path: str) -> str:
            return f"s3://{path}"

    command = fetch_command(Folder(Bucket(), "bucket/my data"), "high_res/0.tar", Member("k.png", 512, 100))
    assert command == (
        "aws s3api get-object --bucket bucket --key 'my data/high_res/0.tar' --range bytes=512-611 k.png"
    )
    folder = open_root("memory://explain-elsewhere")
    folder.write("0.tar", b"0123456789")
    assert fetch_command(folder, "0.tar", Member("k.txt", 2, 3)).startswith("python -c ")


def test_a_failed_sample_shows_its_ledger_rows(tmp_path: Path) -> None:
    """One failure is tolerated: the shard is committed without the sample, and later stages leave it out."""
    dataset = built(tmp_path / "out", ["bad high_res", "a tree"], tmp_path)
    found = explain(dataset, key_of(dataset, 0))
    assert states(found) == ["committed", "committed", "failed", "left out"]
    (row,) = found.stages[2].failures
    assert (row["error_class"], row["message"], row["attempt_number"]) == ("SampleError", "told to fail", 1)
    assert "SampleError: told to fail" in spelled(found)
    assert states(explain(dataset, key_of(dataset, 1))) == ["committed"] * 4


def test_a_sample_that_became_good_in_a_later_attempt(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["bad low_res", "a tree"], tmp_path)
    key = key_of(dataset, 0)
    assert states(explain(dataset, key)) == ["failed", "left out", "left out", "left out"]

    def healed(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        return (Output(sample.key, files=files_of(sample, 16)) for sample in samples)

    run_stage(dataset, "low_res", 0, process=healed, number=2)
    found = explain(dataset, key)
    assert states(found) == ["committed", "pending", "pending", "pending"]
    assert found.stages[0].commit.endswith("/000000.2.json")
    assert Path(found.stages[0].commit).is_file()
    assert [row["message"] for row in found.stages[0].failures] == ["told to fail"], "the ledger keeps it"
    subprocess.run(["bash", "-c", found.stages[0].files[0].fetch], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / f"{key}.png").size == (16, 16)
    assert states(explain(dataset, key_of(dataset, 1))) == ["committed"] * 4
    for stage in ("captions", "high_res", "quality"):
        run_stage(dataset, stage, 0, process=FAKES[stage])
    assert states(explain(dataset, key)) == ["committed"] * 4


def test_a_shard_without_a_commit(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["bad low_res 1", "bad low_res 2", "a"], tmp_path)
    found = explain(dataset, key_of(dataset, 1))
    assert states(found) == ["failed", "left out", "left out", "left out"]
    assert found.stages[0].receipt is None
    assert not Path(found.stages[0].commit).exists()
    fresh = planned(tmp_path / "new", ["a"], tmp_path)
    assert states(explain(fresh, key_of(fresh, 0))) == ["pending"] * 4


def lost_gpu(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    raise GpuLost("an illegal memory access")
    yield


def bad_model(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    raise ConfigError("model x: cannot load unet")
    yield


def test_every_attempt_at_a_shard_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = planned(tmp_path / "out", ["a house", "a tree", "a boat"], tmp_path)
    for stage in ("low_res", "captions"):
        run_stage(dataset, stage, 1, process=FAKES[stage])
    for process, run in ((lost_gpu, "first"), (bad_model, "second")):
        with pytest.raises((GpuLost, ConfigError)):
            run_stage(dataset, "high_res", 1, process=process, provenance={"flow_run_name": f"demo: {run}"})
    key = key_of(dataset, 2)
    found = explain_shard(dataset, 1)
    assert [trace.state for trace in found.stages] == ["committed", "committed", "shard failed", "pending"]
    assert [sample.key for sample in found.samples] == [key]
    assert states(explain(dataset, key)) == ["committed", "committed", "shard failed", "pending"], (
        "not the sample's fault"
    )
    assert states(explain(dataset, key_of(dataset, 0))) == ["pending"] * 4
    for words in (["000001"], ["1"], [key]):
        assert main(["explain", dataset.url, *words]) == 0
        out = capsys.readouterr().out
        for attempt, told, run in zip(
            found.stages[2].attempts,
            ("GpuLost: an illegal memory access", "ConfigError: model x: cannot load unet"),
            ("first", "second"),
            strict=True,
        ):
            assert f"{attempt.failed_at}: {told} (run demo: {run} on {attempt.host}, attempt {attempt.attempt})" in out
        assert key in out
        assert "a boat" in out
    assert main(["explain", dataset.url, "1", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [attempt["error_class"] for attempt in stages[2]["attempts"]] == ["GpuLost", "ConfigError"]
    run_stage(dataset, "high_res", 1, process=FAKES["high_res"])
    trace = explain_shard(dataset, 1).stages[2]
    assert (trace.state, len(trace.attempts)) == ("committed", 2), "what happened is kept"


def test_a_number_is_a_shard_if_the_plan_has_it(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "b", "c"], tmp_path)
    assert [shard_of(dataset, text) for text in ("0", "1", "000001")] == [0, 1, 1]
    for text in ("2", "-1", "0x1", "0000001", "", "a", "1.0", "\u0661"):
        assert shard_of(dataset, text) is None


def test_where_keys_are_is_told_of_what_exists(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a", "b", "c"], tmp_path)
    hint = f"resmaster explain {dataset.url} SHARD lists those of a shard (0 to 1)"
    with pytest.raises(UserError, match="no sample's key begins with 0000") as error:
        find_sample(dataset, "0" * 20)
    assert str(error.value).endswith(f"; {hint}")
    write_manifest(dataset)
    with pytest.raises(UserError) as error:
        find_sample(dataset, "0" * 20)
    assert str(error.value).endswith(f"; keys are in the report and manifest.parquet, and {hint}")


@pytest.mark.parametrize("root", ["s3", "memory", "local"])
def test_an_empty_file_is_fetched_without_a_range(root: str, tmp_path: Path) -> None:
    """A range of no bytes is invalid, and a server may answer it with the whole object."""

    class Bucket:
        def unstrip_protocol(self, path: str) -> str:
            return f"s3://{path}"

    folder = {
        "s3": Folder(Bucket(), "bucket/data"),
        "memory": open_root("memory://explain-empty"),
        "local": open_root(str(tmp_path)),
    }[root]
    command = fetch_command(folder, "captions.tar", Member("k y.txt", 58368, 0))
    assert "58367" not in command
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "k y.txt").read_bytes() == b""


def test_what_is_gone_or_damaged_is_told_in_its_place(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a"], tmp_path)
    key = key_of(dataset, 0)
    first = explain(dataset, key)
    low_res, _, high_res, quality = first.stages
    assert low_res.receipt
    assert high_res.receipt
    Path(dataset.folder.full(low_res.receipt.objects[0].name)).unlink()
    tar = Path(dataset.folder.full(high_res.receipt.objects[0].name))
    tar.write_bytes(tar.read_bytes()[:2000])
    Path(quality.commit).write_text("{}")
    found = explain(dataset, key)
    for trace, culprit in zip(
        [found.stages[0], *found.stages[2:]], ("is gone", "not a readable tar", "damaged commit record")
    ):
        assert culprit in trace.problem
        assert culprit in spelled(found)
    assert not found.stages[1].problem


def test_prefixes(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", [f"prompt {i}" for i in range(40)], tmp_path)
    key = key_of(dataset, 0)
    assert find_sample(dataset, key[:10].upper()).key == key
    firsts = [key_of(dataset, index)[0] for index in range(40)]
    shared = next(first for first in firsts if firsts.count(first) > 1)  # there are but 16 first digits
    with pytest.raises(UserError, match=r"keys begin with .*; give more digits"):
        find_sample(dataset, shared)
    with pytest.raises(UserError, match="no sample's key begins with 00000000000000000000"):
        find_sample(dataset, "0" * 20)
    for wrong in ("", "xyz", "0" * 25, "12.png"):
        with pytest.raises(UserError, match="is no key"):
            find_sample(dataset, wrong)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = built(tmp_path / "out", ["a"], tmp_path)
    key = key_of(dataset, 0)
    assert main(["explain", dataset.url, key[:6], "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sample"]["key"] == key
    assert [stage["state"] for stage in values["stages"]] == ["committed"] * 4
    assert values["stages"][2]["files"][0]["size"] > 0
    assert main(["explain", dataset.url, key]) == 0
    assert capsys.readouterr().out.startswith("key         " + key)
    assert main(["explain", dataset.url, "nonsense"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resmaster: 'nonsense' is no key")
    assert len(err.strip().splitlines()) == 1
