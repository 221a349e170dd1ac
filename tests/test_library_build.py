"""`rm.build`: a dataset in the caller's own process, with callbacks, stopped and gone on with at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import resmaster_stages as rm
from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ConfigError, ResMasterError, ShardError
from resmaster_stages.library.building import BuiltShard
from resmaster_stages.runner import retrying
from tests.checkout import PYTHONPATH
from tests.durability.injection import everything
from tests.fake_stages import FAKES
from tests.flows.test_no_server import write_config
from tests.standin_cli import install

PROMPTS = ["a", "b", "bad high_res", "c", "d"]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", None)
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, stage)
    install(FAKES)  # what it replaces is put back by the lines above


def calls_of(monkeypatch: pytest.MonkeyPatch | None = None) -> Counter[tuple[str, str]]:
    """Counts how often each sample is computed in each stage, from now on."""
    counts: Counter[tuple[str, str]] = Counter()

    def counted(name: str) -> Any:
        def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
            for sample in samples:
                counts[name, sample.prompt] += 1
                yield from FAKES[name](config, [sample])

        return process

    install({name: counted(name) for name in FAKES})
    return counts


def test_a_build_is_that_of_the_command_line(tmp_path: Path) -> None:
    """From a file, a dictionary and a configuration: the same objects and records."""
    config = write_config(tmp_path, PROMPTS)
    assert main(["run", str(config), "--root", str(tmp_path / "cli")]) == 0
    expected = everything(str(tmp_path / "cli"))
    loaded = rm.load_config(config)
    values = loaded.model_dump(exclude_unset=True)
    for number, given in enumerate((config, str(config), values, loaded)):
        root = str(tmp_path / str(number))
        dataset = rm.build(given, root=root)
        assert everything(root) == expected
        assert [sample.prompt for sample in dataset] == ["a", "b", "c", "d"]
        assert dataset.url == f"{root}/demo"
        assert Path(dataset.url, "manifest.parquet").exists()
        assert not dataset.status().publication_line(dataset.url)


def test_callbacks_get_each_sample_each_shard_and_the_progress(tmp_path: Path) -> None:
    config = write_config(tmp_path, PROMPTS)
    samples: list[str] = []
    shards: list[BuiltShard] = []
    steps: list[tuple[int, int]] = []
    dataset = rm.build(
        config,
        on_sample=lambda sample: samples.append(f"{sample.prompt} {sample.high_res.open().size[0]}"),
        on_shard=shards.append,
        progress=lambda *numbers: steps.append(numbers),
    )
    assert [line.split()[0] for line in samples] == ["a", "b", "c", "d"]
    assert [(each.shard, each.samples, each.samples_ok, each.error) for each in shards] == [
        (0, 2, 2, ""),
        (1, 2, 1, ""),
        (2, 1, 1, ""),
    ]
    stages = len(dataset.dataset.hashes)
    assert {total for _, total in steps} == {5 * stages}
    done = [number for number, _ in steps]
    assert done == sorted(done)
    assert set(done) == set(range(5 * stages + 1)) - {0} | {done[0]}
    samples.clear()
    shards.clear()
    again = rm.build(config, on_sample=samples.append, on_shard=shards.append)  # type: ignore[arg-type]
    assert (samples, shards) == ([], []), "nothing was left to do"
    assert len(again) == 4


@pytest.mark.parametrize("moment", ["stage", "progress", "on_sample", "on_shard"])
def test_a_stopped_build_keeps_what_is_done_and_goes_on(moment: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, PROMPTS[:2] + PROMPTS[3:], samples_per_shard=2, spill_seconds=0)
    rm.build(config, root=str(tmp_path / "whole"))
    error = KeyboardInterrupt if moment == "stage" else RuntimeError
    passed = Counter[str]()

    def stop(name: str, after: int) -> None:
        passed[name] += 1
        if name == moment and passed[name] == after:
            raise error("stop")

    def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        for sample in samples:
            stop("stage", 3)
            yield from FAKES["high_res"](config, [sample])

    install({"high_res": high_res})
    root = str(tmp_path / "stopped")
    with pytest.raises(error, match="stop"):
        rm.build(
            config,
            root=root,
            progress=lambda done, total: stop("progress", 13),
            on_sample=lambda sample: stop("on_sample", 2),
            on_shard=lambda shard: stop("on_shard", 1),
        )
    assert list((tmp_path / "stopped").glob("demo/commits/low_res-*/000000.json")), "the first shard's stages are kept"
    counts = calls_of()
    rm.build(config, root=root)
    assert everything(root) == everything(str(tmp_path / "whole"))
    computed = Counter(stage for stage, _ in counts.elements())
    assert sum(computed.values()) < 4 * len(FAKES), "not everything was made again"
    assert ("low_res", "a") not in counts


def test_shards_that_cannot_be_finished_are_named_and_the_others_are_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrying.time, "sleep", lambda seconds: None)
    tries: Counter[str] = Counter()
    troubled = True

    def trouble(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        prompt = samples[0].prompt
        tries[prompt] += 1
        if troubled and prompt == "hopeless":
            raise ShardError("no way")
        if troubled and (prompt == "away" or (prompt == "busy" and tries[prompt] == 1)):
            raise ConnectionError("slow down")
        yield from FAKES["low_res"](config, samples)

    install({"low_res": trouble})
    config = write_config(tmp_path, ["busy", "away", "hopeless", "fine"], samples_per_shard=1)
    shards: list[BuiltShard] = []
    with pytest.raises(rm.BuildIncomplete) as raised:
        rm.build(config, on_shard=shards.append)
    assert tries == {"busy": 2, "away": 1 + retrying.RETRIES, "hopeless": 1, "fine": 1}
    assert raised.value.errors == {1: "low_res: ConnectionError: slow down", 2: "low_res: no way"}
    assert str(raised.value) == (
        "2 of 4 shards are not finished (1, 2); first: shard 1: low_res: ConnectionError: slow down; the others are "
        "done: mend the cause, and call build() again"
    )
    assert isinstance(raised.value, ResMasterError)
    assert {each.shard: each.error for each in shards if each.error} == raised.value.errors
    assert [sample.prompt for sample in raised.value.dataset] == ["busy", "fine"]
    assert Path(raised.value.dataset.url, "manifest.parquet").exists()
    troubled = False
    assert len(rm.build(config)) == 4


def test_too_many_failed_samples_are_told_as_the_command_line_does(tmp_path: Path) -> None:
    config = write_config(tmp_path, ["bad low_res", "bad low_res 2"], samples_per_shard=1, max_failure_ratio=1.0)
    with pytest.raises(rm.BuildIncomplete, match=r"2 of 2 samples failed \(tolerated: 1\).*resmaster explain"):
        rm.build(config)


def test_a_wrong_configuration_is_told_before_anything_is_written(tmp_path: Path) -> None:
    config = write_config(tmp_path, ["a"])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            config,
            {"dispatch": {"where": "workers"}},
            "dispatch.where: workers, and build() computes here",
        ),
        (config, {"upscale": {"stepz": 3}}, "unknown key 'upscale.stepz' (did you mean 'steps'?)"),
        ({"name": "demo", "nmae": 1}, {}, "build(): unknown key 'nmae'"),
        (tmp_path / "nowhere.yaml", {}, "no such configuration file"),
        (config, {"prompts": str(tmp_path / "nowhere.txt")}, "nowhere.txt"),
    ]
    for given, overrides, message in cases:
        with pytest.raises(rm.ResMasterError) as raised:
            rm.build(given, **overrides)
        assert message in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert issubclass(ConfigError, rm.ResMasterError)


def test_a_build_imports_no_prefect_and_starts_no_server(tmp_path: Path) -> None:
    """Also where a Prefect server is configured."""
    config = write_config(tmp_path, ["a", "b"])
    code = f"""
import subprocess, sys
from tests.fake_stages import FAKES
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.models import identity
from dataclasses import replace
import resmaster_stages as rm

started = []

class Watched(subprocess.Popen):
    def __init__(self, args, **kwargs):
        started.append(args[0])
        super().__init__(args, **kwargs)

subprocess.Popen = Watched
identity.weights_of = lambda config: identity.Weights(config.model.id)
for name, process in FAKES.items():
    STAGES[name] = replace(STAGES[name], process=process)
dataset = rm.build({str(config)!r})
assert len(dataset) == 2
assert set(started) <= {{"uname", "git", "nvidia-smi"}}, started  # of the record of what made a shard
heavy = {{"prefect", "sqlalchemy", "fastapi", "torch", "diffusers", "resmaster_flows", "resmaster_tasks"}}
found = {{name.partition(".")[0] for name in sys.modules}}
assert not found & heavy, found & heavy
"""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.s3
def test_a_dataset_is_built_in_a_bucket(s3_root: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, PROMPTS)
    here = {sample.key: sample.high_res.data for sample in rm.build(config)}
    there = rm.build(config, root=s3_root)
    assert there.url == f"{s3_root}/demo"
    assert {sample.key: sample.high_res.data for sample in there} == here
