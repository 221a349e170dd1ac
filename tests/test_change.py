"""A dataset that changes: other settings, more prompts, and back again. `status` shows all of it."""

from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.dataset import Dataset, create_or_open, open_dataset
from resmaster_stages.dataset.plan import read_plan
from resmaster_stages.inspection.status import pending, status
from resmaster_stages.models.identity import Weights
from resmaster_stages.prompts import ingest
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, planned


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))


def work(dataset: Dataset) -> dict[str, list[int]]:
    """Do all that is pending; returns it."""
    todo = pending(dataset)
    for stage in dataset.hashes:
        for shard in todo[stage]:
            run_stage(dataset, stage, shard, process=FAKES[stage])
    return {stage: shards for stage, shards in todo.items() if shards}


def test_settings_change_prompts_are_added_and_everything_is_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = planned(tmp_path, ["a", "b", "c"], tmp_path)
    assert work(first) == {stage: [0, 1] for stage in FAKES}
    was = first.hashes
    assert (status(first).config, status(first).generations) == ("config.json", 1)
    assert [stage.others for stage in status(first).stages] == [{}] * 4

    steps = first.config.upscale.model_copy(update={"steps": 7})
    second = create_or_open(first.config.model_copy(update={"upscale": steps}))
    assert work(second) == {"high_res": [0, 1], "quality": [0, 1]}, "what comes before is used again"
    now = second.hashes
    assert [now[stage] == was[stage] for stage in FAKES] == [True, True, False, False]
    found = status(open_dataset(second.url))
    assert found.config == "configs/0001.json"
    assert [(stage.namespace, stage.others) for stage in found.stages] == [
        (now["low_res"][:8], {}),
        (now["captions"][:8], {}),
        (now["high_res"][:8], {was["high_res"][:8]: 2}),
        (now["quality"][:8], {was["quality"][:8]: 2}),
    ]

    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    ingest(second.config)
    second = open_dataset(second.url)
    assert work(second) == {stage: [2] for stage in FAKES}, "only what is new"
    assert status(second).generations == 2
    assert read_plan(second.folder).read(2)[0].prompt == "d"

    back = create_or_open(first.config)
    assert work(back) == {"high_res": [2], "quality": [2]}, "only what was added since"
    assert write_manifest(back).samples == 4
    found = status(open_dataset(back.url))
    assert (found.config, found.generations, found.shards) == ("configs/0002.json", 2, 3)
    assert [stage.committed for stage in found.stages] == [3, 3, 3, 3]
    assert found.stages[2].others == {now["high_res"][:8]: 3}

    assert main(["status", back.url]) == 0
    told = capsys.readouterr().out
    assert "configuration: configs/0002.json, prompts in 2 generations" in told
    assert f"kept of another one: high_res-{now['high_res'][:8]}, 3 shards" in told
