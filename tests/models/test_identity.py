from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.models import identity
from resmaster_stages.models.identity import weights_of

PARTS = (
    "model_index.json",
    "card.json",
    "unet/w",
    "captioner/w",
    "clip/w",
    "classifier/w",
    "super_resolution/w",
    "control_net/w",
)


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in PARTS:
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text(part)
    monkeypatch.setattr(identity, "pack_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "affects"),
    [
        ("unet/w", {"model"}),
        ("captioner/w", {"captioner"}),
        ("clip/w", {"clip", "caption_check"}),
        ("classifier/w", {"features"}),
        ("control_net/w", set()),
        ("card.json", set()),
    ],
)
def test_a_change_of_one_network_of_the_pack_renames_that_one_only(pack: Path, changed: str, affects: set[str]) -> None:
    config: DatasetConfig = parse_config(
        {
            "name": "d",
            "captions": {"source": "model", "model": "picturebook"},
            "quality": {"clip": "picturebook", "features": "picturebook"},
        },
        "test",
    )
    before = weights_of(config)
    (pack / changed).write_text("other")
    identity._pack_digest.cache_clear()
    after = weights_of(config)
    names = ("model", "captioner", "clip", "features", "caption_check")
    assert {name for name in names if getattr(before, name) != getattr(after, name)} == affects
    assert all(getattr(after, name) for name in names)


def test_the_packs_control_net_has_a_name_of_its_own(pack: Path) -> None:
    model = parse_config({"name": "d", "model": {"controlnet": {"id": "picturebook"}}}, "test").model
    before = identity.control_identity(model)
    (pack / "unet/w").write_text("other")
    identity._pack_digest.cache_clear()
    assert identity.control_identity(model) == before
    (pack / "control_net/w").write_text("other")
    identity._pack_digest.cache_clear()
    assert identity.control_identity(model) != before


def test_the_model_that_checks_captions_has_a_name_where_captions_are_checked(pack: Path) -> None:
    def judge(**captions: object) -> str | None:
        values = {"name": "d", "captions": captions, "quality": {"clip": "o/q", "clip_revision": "1"}}
        return weights_of(parse_config(values)).caption_check

    assert judge() == "o/q@1"
    assert judge(check={"clip": "o/c", "clip_revision": "2"}) == "o/c@2"
    assert judge(check={"clip": "o/c"}) == "o/c@main"
    assert judge(check={"enabled": False}) is None
    assert judge(source="prompt") is None
