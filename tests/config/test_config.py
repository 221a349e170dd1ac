"""Configurations: what is refused and how; what is in a stage's identity and what is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config
from resmaster_stages.config.method import Method, methods, with_method
from resmaster_stages.config.structure import STRUCTURE_PRESETS
from resmaster_stages.dataset.stages import hashes_of, reads_of, stages_of
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.identity import Weights
from tests.checkout import ROOT

WEIGHTS = Weights("model", "captioner", "clip")
DATASETS = sorted((ROOT / "deployments" / "datasets").glob("*.yaml"))


def config(**values: object) -> DatasetConfig:
    return parse_config({"name": "test", **values})


def hashes(some: DatasetConfig) -> dict[str, str]:
    return hashes_of(some, WEIGHTS)


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.name == path.stem
    assert Path(loaded.prompts or "").is_absolute()


def test_the_configurations_that_are_shipped() -> None:
    assert {path.stem for path in DATASETS} == {
        "picturebook",
        "picturebook-evaluation",
        "picturebook-few-step",
        "picturebook-controlnet",
        "sdxl-2k",
        "sdxl-4k",
        "sdxl-few-step-4k",
        "sdxl-controlnet-4k",
        "flux-4k",
        "z-image-4k",
        "sd35-4k",
        "pixart-4k",
        "qwen-4k",
    }


@pytest.mark.parametrize(
    ("values", "culprit", "advice"),
    [
        ({"upscal": {}}, "'upscal'", "known here"),
        ({"upscale": {"methd": "direct"}}, "'upscale.methd'", "method resmaster knows: method, preset, scale"),
        ({"upscale": {"method": "demofusion", "image_prompt": {}}}, "'upscale.image_prompt'", "cosine_scale_1"),
        ({"upscale": {"structure": {"cutof": 1}}}, "'upscale.structure.cutof'", "known here: enabled, cutoff"),
        ({"upscale": {"method": ["direct"]}}, "unknown method", "resmaster"),
        ({"upscale": {"method": "freescale", "alpha": -1}}, "upscale.alpha", "greater than or equal to 0"),
        ({"upscale": {"method": "magic"}}, "'magic'", "resmaster"),
        ({"upscale": {"scale": 0.5}}, "upscale.scale", "greater than or equal to 1"),
        ({"upscale": {"method": "resmastr"}}, "'resmastr'", "did you mean 'resmaster'?"),
        ({"upscale": {"preset": "exat"}}, "'exat'", "did you mean 'exact'?"),
        ({"upscale": {"structure": {"preset": "nope"}}}, "'nope'", "paper"),
        ({"upscale": {"structure": {"preset": "papr"}}}, "'papr'", "did you mean 'paper'?"),
        ({"upscale": {"structure": {"preset": ["paper"]}}}, "unknown preset", "give one of: default, paper"),
        ({"upscale": {"structure": {"start": 0.5, "stop": 0.5}}}, "upscale.structure", "greater than start"),
        ({"model": {"dtype": "int4"}}, "model.dtype", "float32"),
        ({"name": "../etc"}, "name", "letters"),
        ({"prompts": "a", "images": "b"}, "prompts or images", "not both"),
        ({"captions": {"check": {"margin": -1}}}, "captions.check.margin", "greater than or equal to 0"),
        ({"captions": {"check": {"clip_revision": "1"}}}, "captions.check", "needs a model in clip"),
        ({"samples_per_shard": 0}, "samples_per_shard", "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(values: dict, culprit: str, advice: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "test", **values}, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    assert culprit in message
    assert advice in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [", "not valid YAML"),
        (b"- a\n- b", "expected a mapping"),
        (b"", "expected a mapping"),
        (b"\xff\xfe\x00binary", "not a text file"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: a\nprompts: lists/p.txt\n")
    assert load_config(tmp_path / "c.yaml").prompts == str(tmp_path / "lists" / "p.txt")
    overridden = load_config(tmp_path / "c.yaml", images="/somewhere", limit=None)
    assert (overridden.prompts, overridden.images, overridden.limit) == (None, "/somewhere", None)


def test_a_tilde_in_a_file_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "c.yaml"
    for given, expected in (
        ("~/p.txt", tmp_path / "home" / "p.txt"),
        ("~nobody-of-that-name/p.txt", tmp_path / "~nobody-of-that-name" / "p.txt"),
        ("./~/p.txt", tmp_path / "~" / "p.txt"),
        ("/a/../p.txt", Path("/a/../p.txt")),
        ("s3://b/~/p.txt", "s3://b/~/p.txt"),
    ):
        for key in ("prompts", "images"):
            path.write_text(f"name: a\n{key}: {given}\n")
            assert getattr(load_config(path), key) == str(expected)
    path.write_text("name: a\nprompts: ''\n")
    assert not load_config(path).prompts, "no source, rather than the folder of the file"


def test_operational_fields_are_not_identity() -> None:
    base = config()
    same = config(
        root="s3://elsewhere/x",
        limit=3,
        model={"device": "cuda", "offload": "model"},
        low_res={"batch_size": 1},
        captions={"batch_size": 1},
        upscale={"view_batch": 1},
        quality={"device": "cpu"},
    )
    assert hashes(base) == hashes(same)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 1}, {"low_res", "captions", "high_res", "quality"}),
        ({"low_res": {"steps": 7}}, {"low_res", "captions", "high_res", "quality"}),
        ({"captions": {"instruction": "say it"}}, {"captions", "high_res", "quality"}),
        ({"captions": {"check": {"margin": 9}}}, {"captions", "high_res", "quality"}),
        ({"upscale": {"steps": 7}}, {"high_res", "quality"}),
        ({"upscale": {"scale": 2.0}}, {"captions", "high_res", "quality"}),
        ({"quality": {"max_seam": 9.0}}, {"quality"}),
    ],
)
def test_a_change_reaches_its_stage_and_what_depends_on_it_only(change: dict, changed: set[str]) -> None:
    before, after = hashes(config()), hashes(config(**change))
    assert {stage for stage in before if before[stage] != after[stage]} == changed


def test_weights_are_identity() -> None:
    changes = {
        "model": {"low_res", "captions", "high_res", "quality"},
        "captioner": {"captions", "high_res", "quality"},
        "clip": {"quality"},
        "caption_check": {"captions", "high_res", "quality"},
    }
    before = hashes(config())
    for name, changed in changes.items():
        other = replace(WEIGHTS, **{name: "other"})
        after = hashes_of(config(), other)
        assert {stage for stage in before if after[stage] != before[stage]} == changed


def test_captions_are_skipped_where_nothing_reads_them() -> None:
    assert stages_of(config()) == tuple(hashes(config())) == ("low_res", "captions", "high_res", "quality")
    assert reads_of(config(), "high_res") == ("low_res", "captions")
    without = config(upscale={"text_prompt": {"enabled": False}})
    assert stages_of(without) == tuple(hashes(without)) == ("low_res", "high_res", "quality")
    assert reads_of(without, "high_res") == ("low_res",)
    other_captions = config(upscale={"text_prompt": {"enabled": False}}, captions={"instruction": "say it"})
    assert hashes(without)["high_res"] == hashes(other_captions)["high_res"]


def test_presets_expand_and_explicit_fields_win() -> None:
    for name, values in STRUCTURE_PRESETS.items():
        structure = config(upscale={"structure": {"preset": name}}).upscale.structure
        assert values.items() <= structure.model_dump().items()
    mixed = config(upscale={"structure": {"preset": "paper", "cutoff": 0.3}}).upscale.structure
    assert (mixed.cutoff, mixed.cutoff_units) == (0.3, "hr_nyquist")


def test_every_field_says_what_it_is() -> None:
    def undocumented(schema: dict) -> list[str]:
        parts = {"DatasetConfig": schema, **schema.get("$defs", {})}
        return [
            f"{part}.{name}"
            for part, body in parts.items()
            for name, field in body.get("properties", {}).items()
            if not field.get("description")
        ]

    assert undocumented(DatasetConfig.model_json_schema()) == []


def test_the_schema_offers_each_method_with_its_presets() -> None:
    """For forms and editors. They send defaults along as values, so fields that presets set have none."""
    alternatives = {
        each["title"]: each["properties"]
        for each in DatasetConfig.model_json_schema()["properties"]["upscale"]["anyOf"]
    }
    assert list(alternatives) == ["resmaster", *(name for name in methods() if name != "resmaster")]
    for name, fields in alternatives.items():
        assert all(field.get("description") for field in fields.values()), name
        assert fields["method"]["const"] == fields["method"]["default"] == name
        assert fields["preset"]["enum"] == list(methods()[name].presets)
    assert "cosine_scale_1" in alternatives["demofusion"]
    assert "default" not in alternatives["resmaster"]["steps"]


def test_a_configuration_survives_its_own_json() -> None:
    some = config(upscale={"structure": {"preset": "paper_decay"}})
    assert parse_config(some.model_dump(mode="json")) == some


def test_known_hashes_stand() -> None:
    """They may change on purpose alone: where they do, every dataset is made anew."""
    weights = Weights("m", "c", "q")
    for upscale, expected in (
        ({"preset": "exact"}, "c51ea8c68266bc07"),
        ({"method": "direct"}, "ee1c36ec1462f09e"),
        ({"method": "lanczos", "scale": 2.0}, "3211641cd0633ccf"),
    ):
        unchecked = config(upscale=upscale, captions={"check": {"enabled": False}}, image_metadata="none")
        assert hashes_of(unchecked, weights)["high_res"].startswith(expected)


def test_the_check_of_captions_is_their_identity_where_there_is_one() -> None:
    def captions_hash(**values: object) -> str:
        return hashes(config(**values))["captions"]

    off = captions_hash(captions={"check": {"enabled": False}})
    assert captions_hash() != off
    assert captions_hash(quality={"clip": None}) == off, "no model, no check"
    assert captions_hash(captions={"check": {"margin": 5}}) != captions_hash()
    assert captions_hash(captions={"check": {"clip": "picturebook"}}) == captions_hash(), (
        "what quality.clip names anyway"
    )
    assert captions_hash(quality={"clip": "a/b"}) != captions_hash()
    assert captions_hash(quality={"clip": "a/b"}) != captions_hash(quality={"clip": "a/b", "clip_revision": "1"})
    own = {"check": {"clip": "c/d", "clip_revision": "2"}}
    assert captions_hash(captions=own, quality={"clip": "a/b"}) == captions_hash(captions=own, quality={"clip": None})
    assert captions_hash(captions=own) != captions_hash(captions={"check": {"clip": "c/d"}})
    prompts = [captions_hash(captions={"source": "prompt", "check": {"margin": margin}}) for margin in (1, 2)]
    assert prompts[0] == prompts[1], "a prompt is not checked"
    unread = [hashes(config(captions={"check": {"enabled": False, "margin": margin}})) for margin in (1, 2)]
    assert unread[0] == unread[1]


def test_words_by_attention_depend_on_the_base_model_and_are_not_checked() -> None:
    def captions_hash(**values: object) -> str:
        return hashes(config(images="my-images", **values))["captions"]

    attention = {"captions": {"source": "attention"}}
    assert captions_hash(**attention) != captions_hash(captions={"source": "prompt"})
    assert captions_hash(**attention, quality={"clip": None}) == captions_hash(**attention)
    assert captions_hash(**attention, model={"dtype": "bfloat16"}) != captions_hash(**attention)
    assert captions_hash(captions={"source": "prompt"}, model={"dtype": "bfloat16"}) == captions_hash(
        captions={"source": "prompt"}
    ), "the base model draws no captions there"
    for change in ({"coverage": 0.2}, {"noise_levels": 4}):
        assert captions_hash(captions={"source": "attention", **change}) != captions_hash(**attention)
        with pytest.raises(ConfigError, match=r"is read only with source: attention; set that, or drop"):
            config(captions=change)
    named = config().captions.identity().keys()
    assert not named & {"coverage", "noise_levels"}, "older datasets keep their identity"


def test_a_methods_identity_is_its_own_fields_and_its_name() -> None:
    demofusion = config(upscale={"method": "demofusion", "view_batch": 3}).upscale
    later = {"time_shift", "guidance_low", "reference", "control", "skip", "shuffle", "text_prompt", "colour_match"}
    assert demofusion.identity().keys() == type(demofusion).model_fields.keys() - {"preset", "view_batch", *later}
    assert config(upscale={"method": "lanczos"}).upscale.identity() == {"method": "lanczos", "scale": 4.0}
    shifted = config(upscale={"method": "demofusion", "time_shift": "sqrt"}).upscale
    assert shifted.identity() == {**demofusion.identity(), "time_shift": "sqrt"}, "only where it is not the default"
    for name, method in methods().items():
        assert method.model_fields["method"].default == name
        changed = config(upscale={"method": name, "scale": 2})
        assert hashes(config(upscale={"method": name}))["high_res"] != hashes(changed)["high_res"]


def test_a_method_that_makes_other_images_than_before_has_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config(upscale={"method": "multidiffusion"}).upscale
    first = before.identity()
    assert "version" not in first
    monkeypatch.setattr(type(before), "version", 2)
    assert before.identity() == {**first, "version": 2}
    for name in ("direct", "scalecrafter", "fouriscale"):
        assert config(upscale={"method": name}).upscale.identity()["version"] == 2


def test_a_field_of_the_same_name_belongs_to_its_method() -> None:
    """`start` of the phases of DemoFusion is not that of one path from the reference."""
    late = {"method": "direct", "init": "noised_lr", "start": 0.65}
    assert with_method(late, "scalecrafter") == {**late, "method": "scalecrafter"}
    assert with_method(late, "demofusion") == {"method": "demofusion"}


def test_method_presets_expand_and_explicit_fields_win() -> None:
    faithful = config(upscale={"method": "demofusion", "preset": "faithful", "start": 0.2}).upscale
    assert (faithful.start, faithful.jitter, faithful.stepper) == (0.2, "zeros", "ddim_keep")
    assert parse_config(config(upscale=faithful.model_dump()).model_dump(mode="json")).upscale == faithful
    for name, method in methods().items():
        papers = (
            {"rectifiedhr", "frecas", "diffusehigh", "megafusion"}
            if name == "cascade"
            else {"faithful", "exact", "accdiffusion"}
        )
        assert {"default"} <= method.presets.keys() <= {"default"} | papers
        for preset in method.presets:
            config(upscale={"method": name, "preset": preset})
    part = config(upscale={"preset": "faithful", "structure": {"cutoff": 0.5}}).upscale.structure
    assert (part.cutoff, part.stop) == (0.5, 1.0), "of a part, too, explicit fields win and the others are the preset's"
    with pytest.raises(ConfigError, match="unknown preset 'best'; known: default, faithful"):
        config(upscale={"method": "demofusion", "preset": "best"})


def test_another_method_gets_what_was_set_but_not_what_resmasters_preset_set() -> None:
    upscale = Method.model_validate({"steps": 16, "shift_stop": 0.7, "guidance_scale": 4.0})
    values = upscale.model_dump(mode="json", exclude_unset=True)
    assert with_method(values, "direct") == {"method": "direct", "steps": 16, "guidance_scale": 4.0}
    assert Method.model_validate(with_method(values, "resmaster")) == upscale
    for method in methods():
        Method.model_validate(with_method(values, method))
    still = Method.model_validate({"shift": "none"}).model_dump(mode="json", exclude_unset=True)
    assert with_method(still, "direct") == {"method": "direct"}
    assert with_method(still, "multidiffusion") == {"method": "multidiffusion", "shift": "none"}
    exact = Method.model_validate({"preset": "exact", "steps": 16}).model_dump(mode="json", exclude_unset=True)
    assert exact == {"preset": "exact", "steps": 16}
    assert with_method(exact, "direct") == {"method": "direct", "steps": 16}
    assert with_method(exact, "resmaster") == exact
    free = {"method": "freescale", "preset": "faithful", "alpha": 2.0}
    assert with_method(free, "demofusion") == {"method": "demofusion", "preset": "faithful"}
    spelled = {"stepper": "posterior", "steps": 9}
    assert with_method(spelled, "direct") == {**spelled, "method": "direct"}


@pytest.mark.parametrize(
    "given", [{}, {"preset": "exact"}, {"preset": "faithful", "steps": 7}, {"shift": "none"}], ids=str
)
def test_what_was_given_is_all_that_is_set(given: dict[str, object]) -> None:
    made = Method.model_validate(given)
    assert made.model_fields_set == given.keys()
    for again in (made.model_dump(exclude_unset=True), made.model_dump(), made.model_dump(mode="json")):
        assert Method.model_validate(again) == made
    assert "preset" not in made.identity()


def test_what_a_preset_sets_goes_where_the_user_turned_off_what_it_hangs_on() -> None:
    still = Method.model_validate({"shift": "none"})
    assert (still.shift_stride, still.shift_stop, still.start) == (None, 1.0, 0.3)
    noise = Method.model_validate({"init": "noise"})
    assert (noise.start, noise.shift) == (0.0, "every_step")
