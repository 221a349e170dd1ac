"""A build without a configured server: no server, no other process, nothing of Prefect's, and the same retries and ends
as on a server. A configured server that is lost in a build."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ShardError
from resmaster_stages.keys import prompt_key
from resmaster_stages.planning.redoing import asked
from resmaster_stages.runner import retrying
from tests.checkout import PYTHONPATH
from tests.fake_stages import FAKES, config_at
from tests.flows.cli.test_stop import SLOW, processes_of, start, wait_for
from tests.server.conftest import Stack, descendants, wait
from tests.standin_cli import install

LOOSE = {"samples_per_shard": 1, "max_failure_ratio": 0.7}


def write_config(folder: Path, prompts: Sequence[str], **values: object) -> Path:
    (folder / "prompts.txt").write_text("\n".join(prompts))
    config = config_at(folder / "out", prompts=str(folder / "prompts.txt"), **values)
    (folder / "demo.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return folder / "demo.yaml"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", None)
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, stage)
    install(FAKES)  # what it replaces is put back by the lines above

    def refuse(*args: object) -> None:
        raise AssertionError("a build without a configured server started one")

    monkeypatch.setattr("prefect.server.api.server.SubprocessASGIServer.start", refuse)


@pytest.mark.parametrize(
    "settings",
    [
        {"PREFECT_HOME": "{folder}/prefect"},
        {"PREFECT_HOME": "/proc/nowhere"},
        {"PREFECT_HOME": "{folder}/prompts.txt/below"},
        {"PREFECT_HOME": "{folder}/prefect", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"},
        {"PREFECT_HOME": "{folder}/prefect", "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": "s3-bucket/nosuch"},
    ],
)
def test_a_build_without_a_server_leaves_nothing_of_prefect(settings: dict[str, str], tmp_path: Path) -> None:
    """Whatever the settings say that only a server needs."""
    config = write_config(tmp_path, ["a", "b", "c"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    told = {name: value.format(folder=tmp_path) for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.standin_cli", "run", str(config)],
        env={**environment, **told, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "demo" / "manifest.parquet").exists()
    home = tmp_path / "prefect"
    assert not home.exists() or not list(home.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("at_work", [False, True], ids=["starting", "at work"])
def test_a_killed_run_leaves_no_process(at_work: bool, tmp_path: Path) -> None:
    """kill -9, or out of memory: the command is the only process of a build."""
    config = write_config(tmp_path, [f"prompt {n}" for n in range(50)])
    scratch = tmp_path / "scratch"
    process = start(["-c", SLOW, "run", str(config)], scratch)
    wait_for(lambda: list((tmp_path / "out").glob("demo/commits/*/*.json" if at_work else "demo/config.json")), process)
    assert descendants(process.pid) == []
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert processes_of(scratch) == []


@pytest.mark.usefixtures("stand_ins")
def test_errors_that_may_pass_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As often as on a server, with the delays of a server, and said in one line. What cannot pass is not."""
    calls: Counter[str] = Counter()
    delays: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", delays.append)

    def trouble(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        prompt = samples[0].prompt
        calls[prompt] += 1
        if prompt == "hopeless":
            raise ShardError("no way")
        if prompt == "away" or (prompt == "busy" and calls[prompt] == 1):
            raise ConnectionError("slow down")
        yield from FAKES["low_res"](config, samples)

    install({"low_res": trouble})
    config = write_config(tmp_path, ["busy", "away", "hopeless", "fine"], samples_per_shard=1)
    assert main(["run", str(config)]) == 1
    assert calls == {"busy": 2, "away": 1 + retrying.RETRIES, "hopeless": 1, "fine": 1}
    assert [round(delay / seconds, 9) for delay, seconds in zip(delays, (2, 2, 4, 8), strict=True)] == pytest.approx(
        [1.25] * 4, abs=0.25
    )
    said = capsys.readouterr().err
    assert "  low_res: ConnectionError: slow down; trying again in " in said
    assert "shard 000001 not finished: low_res: ConnectionError: slow down" in said
    assert "shard 000002 not finished: low_res: no way" in said
    assert "Traceback" not in said
    assert "2 samples in" in said, "the others are published"


@pytest.mark.server
@pytest.mark.timeout(300)
def test_a_configured_server_that_is_lost_ends_the_build_in_one_line(tmp_path: Path) -> None:
    """Nothing of Prefect's own alarm reaches the terminal, and the process does not wait for what it cannot send."""
    config = write_config(tmp_path, [f"prompt {n}" for n in range(6)], dispatch={"where": "here"})
    (tmp_path / "prefect").mkdir()
    stack = Stack(tmp_path / "prefect")
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port), "--no-ui")
    try:
        wait(stack.healthy, seconds=300)
        settings = {"PREFECT_API_URL": stack.api, "PREFECT_HOME": stack.environment["PREFECT_HOME"]}
        settings["PREFECT_CLIENT_MAX_RETRIES"] = "1"
        process = start(["-c", SLOW, "run", str(config)], tmp_path / "scratch", settings)
        wait_for(lambda: list((tmp_path / "out").glob("demo/commits/low_res-*/*.json")), process)
        stack.kill("server")
        out, error = process.communicate(timeout=120)
    finally:
        for name in list(stack.processes):
            stack.kill(name)
    assert process.returncode == 1
    assert out == ""
    first, page, *progress, last = error.splitlines()
    progress.insert(0, first)
    assert re.fullmatch(r"  page of this build: http://127\.0\.0\.1:\d+/runs/flow-run/\S+", page)
    assert re.fullmatch(f"resmaster: {stack.api}: lost .*; what is committed is kept: run the same command again", last)
    assert [line for line in progress if not line.startswith(("demo: ", "  shard 0000"))] == []
    assert len(progress) == 1 + 3 * len(FAKES), "the shards are finished nevertheless"
    assert main(["status", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("stand_ins")
def test_a_build_that_loses_too_many_samples_does_not_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of one sample may lose it, so every shard is committed. The commands that publish say how it stands."""
    config = write_config(tmp_path, ["bad low_res", "bad high_res 1", "c"], samples_per_shard=1)
    root = str(tmp_path / "out" / "demo")
    for command in (["run", str(config)], ["repair", root], ["publish", root]):
        assert main(command) == 1, command
        said = capsys.readouterr().err.splitlines()
        (line,) = [line for line in said if line.startswith("2 of 3 samples failed (tolerated: 1); ")]
        explain, again = line.partition("; to see why: ")[2].split("; mend the cause, then try them again with: ")
        assert again == f"resmaster repair {root} --retry-errors"
        assert main(shlex.split(explain)[1:]) == 0
        assert "told to fail" in capsys.readouterr().out
    assert (tmp_path / "out" / "demo" / "manifest.parquet").exists(), "the others are published"
    assert main(["run", str(write_config(tmp_path, ["bad low_res", "bad high_res 1", "c"], **LOOSE))]) == 0


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("ratio", [0, 1])
def test_a_build_without_a_single_sample_does_not_end_well(
    ratio: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, ["bad low_res"], max_failure_ratio=ratio)
    assert main(["run", str(config)]) == 1
    assert "1 of 1 samples failed (tolerated: 0); to see why: resmaster explain " in capsys.readouterr().err


@pytest.mark.usefixtures("stand_ins")
def test_a_sample_among_several_may_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_config(tmp_path, ["bad low_res", "b"]))]) == 0
    assert "1 samples, 1 failed (see errors/) in " in capsys.readouterr().err


@pytest.mark.usefixtures("stand_ins")
def test_chosen_samples_are_made_again_and_excluded_ones_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, ["a", "b", "c", "d"])
    root = str(tmp_path / "out" / "demo")

    def said(*words: str, status: int = 0) -> str:
        assert main([str(word) for word in words]) == status, words
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    assert "excluded by --exclude" in said("plan", config, "--exclude", prompt_key("c", "", 16, 16))
    said("run", config, "--exclude", prompt_key("c", "", 16, 16))
    dataset = open_dataset(root)
    a, b, d = dataset.plan.keys()
    assert said("run", config).count("  shard ") == 0, "nothing is left to do"
    before = dataset.commits("high_res").read_all()

    (tmp_path / "rejects.csv").write_text(f"key,verdict\n{a},kept\n{b},rejected\n")
    told = said("repair", root, "--redo", tmp_path / "rejects.csv")
    assert "1 sample to make again from low_res on (redo/0001.json)" in told
    assert "3 samples in " in told
    after = dataset.commits("high_res").read_all()
    assert after[1] == before[1]
    assert (after[0].number, after[0].takes) == (2, {b: 1})
    assert "take 1, from low_res on" in said("explain", root, b[:10])
    assert "nothing to repair" in said("repair", root)
    asked(open_dataset(root), d, "high_res")
    assert "to make again: high_res of 1 samples, quality of 1 samples; go on: resmaster repair" in said("status", root)
    said("repair", root, "--redo", d, "--from", "high_res")
    assert [dataset.commits(stage).read_all()[1].number for stage in dataset.hashes] == [1, 1, 2, 2]
    said("verify", root)

    files = {file.name for file in dataset.folder.files()}
    for words, message in (
        (["repair", root, "--redo", "0" * 24], "no sample has a key that begins with 0"),
        (["repair", root, "--redo", "no key"], "'no key' is no key"),
        (["repair", root, "--redo", a, "--shards", "0"], "--redo and --shards exclude each other"),
        (["repair", root, "--redo", a, "--stages", "high_res"], "--redo and --stages exclude each other"),
        (["repair", root, "--from", "high_res"], "--from is of --redo"),
        (["repair", root, "--redo", a, "--from", "quality"], "--from quality: no new seed"),
        (["run", config, "--exclude", a], f"sample {a} is planned already"),
    ):
        assert message in said(*words, status=2)
    assert {file.name for file in dataset.folder.files()} == files, "nothing is done"
