"""`resmaster plan --estimate`: from commits where there are any, else from the table; never a number without a
source."""

import json
from pathlib import Path

import pytest
import yaml

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.errors import UserError
from resmaster_stages.planning.estimate import (
    PICTUREBOOK_RATES,
    SDXL_RATES,
    Estimate,
    StageEstimate,
    estimate,
)
from resmaster_stages.planning.preview import preview
from resmaster_stages.runner.run import run_stage
from tests.fake_stages import FAKES, config_at, planned
from tests.tiny_models import save
from tests.tiny_transformers import make_flux


def stage_of(found: Estimate, name: str) -> StageEstimate:
    return next(stage for stage in found.stages if stage.stage == name)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def sdxl(tmp_path: Path, **values: object) -> DatasetConfig:
    """A configuration with a model of SDXL's sizes: the files of a tiny one, which tell other sizes."""
    if not (tmp_path / "model").exists():
        save(tmp_path / "model")
        edit_json(tmp_path / "model" / "unet" / "config.json", sample_size=128)
        edit_json(tmp_path / "model" / "vae" / "config.json", block_out_channels=[128, 256, 512, 512])
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(1000)))
    folder = str(tmp_path / "model")
    adapter = {"id": folder, "subfolder": "ip_adapter", "weight_name": "ip-adapter.safetensors"}
    model = {"id": folder, "ip_adapter": adapter}
    base = {"prompts": str(tmp_path / "prompts.txt"), "model": model, "low_res": {}}
    return config_at(tmp_path / "out", **{**base, "samples_per_shard": 64, **values})


def test_without_commits_the_table_speaks_and_says_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # someone/else can be downloaded later
    found = estimate(preview(sdxl(tmp_path)), workers=8, price=2.0)
    assert found.shards == 16
    high_res = stage_of(found, "high_res")
    rows = 11 * 25 * 2 + 2 * 25 + 5 * 49  # 18 of 25 steps: with guidance, without, and the last on all views
    assert high_res.seconds_per_sample == pytest.approx(rows / 2 * 0.122), "two rows are a guided view"
    exact = estimate(preview(sdxl(tmp_path, upscale={"preset": "exact"})))
    assert stage_of(exact, "high_res").seconds_per_sample == pytest.approx(50 * 49 * 0.122)
    assert high_res.seconds_source.startswith("estimate: 0.122 s per guided native view")
    assert stage_of(found, "low_res").seconds_per_sample == pytest.approx(50 * 0.122)
    assert stage_of(found, "captions").seconds_per_sample == pytest.approx(49 * (0.008 + 0.0027)), (
        "picturebook's captioner and CLIP"
    )
    unchecked = estimate(preview(sdxl(tmp_path, quality={"clip": None})))
    assert stage_of(unchecked, "captions").seconds_per_sample == pytest.approx(49 * 0.008)
    judged = estimate(preview(sdxl(tmp_path, captions={"check": {"clip": "someone/else"}})))
    assert judged.unknown == ("captions",), "its speed is not known"
    attended = sdxl(tmp_path, captions={"source": "attention", "noise_levels": 4})
    assert stage_of(estimate(preview(attended)), "captions").seconds_per_sample == pytest.approx(4 / 2 * 0.122)
    assert found.unknown == ()
    assert found.cost == pytest.approx(2.0 * found.device_hours)
    assert found.wall_seconds == pytest.approx(found.device_hours * 3600 / 8), "16 shards in two rounds of eight"
    assert estimate(preview(sdxl(tmp_path)), workers=9).wall_seconds == found.wall_seconds, "still two rounds"

    other = sdxl(tmp_path, captions={"model": "someone/else"}, quality={"clip": None})
    found = estimate(preview(other))
    assert found.unknown == ("captions", "quality")
    assert "build a few shards first" in stage_of(found, "captions").seconds_source

    no_unet = sdxl(tmp_path, upscale={"method": "super_resolution"})
    assert estimate(preview(no_unet)).unknown == ("high_res",)


def test_a_model_of_another_size_has_no_table(tmp_path: Path) -> None:
    config = sdxl(tmp_path)
    edit_json(tmp_path / "model" / "unet" / "config.json", sample_size=96)
    from resmaster_stages.models import places

    places._read_json.cache_clear()
    assert set(estimate(preview(config)).unknown) == {"low_res", "captions", "high_res", "quality"}
    places._read_json.cache_clear()


def test_a_model_of_another_family_has_no_table(tmp_path: Path) -> None:
    """Also if its native size is SDXL's: a row of a transformer takes another time."""
    folder = tmp_path / "flux"
    make_flux().save_pretrained(folder)
    edit_json(folder / "vae" / "config.json", sample_size=1024)
    values = {
        "prompts": sdxl(tmp_path).prompts,
        "model": {"id": str(folder)},
        "low_res": {"guidance_scale": 3.5},
        "upscale": {"guidance_scale": 3.5, "image_prompt": {"enabled": False}},
        "quality": {"clip": None},
    }
    config = config_at(tmp_path / "out", **values)
    found = estimate(preview(config))
    assert set(found.unknown) == {"low_res", "captions", "high_res", "quality"}
    assert "build a few shards first" in stage_of(found, "high_res").seconds_source
    assert found.device_hours == 0


def test_commits_of_the_same_stage_count_more_than_any_table(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", [f"prompt {i}" for i in range(10)], tmp_path)
    look = preview(dataset.config)
    assert all("commits" not in stage.seconds_source for stage in estimate(look).stages)
    for shard in (0, 3):
        receipt = run_stage(dataset, "low_res", shard, process=FAKES["low_res"])
        path = Path(dataset.folder.full(f"commits/low_res-{receipt.stage_hash[:8]}/{shard:06d}.json"))
        record = json.loads(unsigned(path.read_bytes()))
        path.write_bytes(signed({**record, "seconds": 3.0, "provenance": {"gpu": "a big one"}}, indent=1))
        size = receipt.objects[0].bytes
    found = estimate(preview(dataset.config))
    low_res = stage_of(found, "low_res")
    assert (low_res.shards, low_res.samples) == (3, 6)
    assert low_res.seconds_per_sample == pytest.approx(1.5)
    assert low_res.seconds == pytest.approx(9.0)
    assert low_res.seconds_source == "measured: 2 commits of this stage on a big one"
    assert low_res.bytes == pytest.approx(3 * size)
    assert found.shards == 5, "other stages have all to do"
    assert "commits" not in stage_of(found, "captions").seconds_source

    changed = preview(dataset.config.model_copy(update={"image_format": "png"}))
    assert "commits" not in stage_of(estimate(changed), "low_res").seconds_source, "another identity"


def test_nothing_left_takes_nothing(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a", "b", "c"], tmp_path)
    for stage, process in FAKES.items():
        for shard in (0, 1):
            run_stage(dataset, stage, shard, process=process)
    found = estimate(preview(dataset.config), workers=3, price=1)
    assert (found.device_hours, found.cost, found.bytes, found.wall_seconds) == (0, 0, 0, 0)
    assert found.unknown == ()


def test_rates_follow_their_points_and_power_laws_between() -> None:
    assert SDXL_RATES.row_seconds(4.0) == pytest.approx(0.39)
    assert SDXL_RATES.row_seconds(16.0) == pytest.approx(3.275)
    assert 0.061 < SDXL_RATES.row_seconds(2.0) < 0.39
    assert SDXL_RATES.row_seconds(64.0) > 4 * 3.275, "attention grows faster than the area"
    assert PICTUREBOOK_RATES.row_seconds(3.0) == pytest.approx(0.033)


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a"], tmp_path)
    with pytest.raises(UserError, match="--workers 0"):
        estimate(preview(dataset.config), workers=0)
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--price"):
            estimate(preview(dataset.config), price=price)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.yaml"
    (tmp_path / "prompts.txt").write_text("a red house\na blue boat\n")
    path.write_text(yaml.safe_dump({"name": "demo", "root": str(tmp_path / "out"), "prompts": "prompts.txt"}))
    assert load_config(path).name == "demo"
    assert main(["plan", str(path), "--estimate", "--price", "3", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    for part in ("device time:", "at 3 an hour", "on 2 workers", "measured by this project", "Not counted:"):
        assert part in out
    assert not (tmp_path / "out").exists()
    assert main(["plan", str(path), "--price", "3"]) == 2
    assert "add --estimate" in capsys.readouterr().err
