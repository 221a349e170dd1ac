"""What the images of a dataset say of themselves, and that datasets keep what they were made with."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import load_config, parse_config, type_at
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.part import Part
from resmaster_stages.dataset.dataset import create_or_open, find_dataset, open_dataset, planned_dataset
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.models.identity import Weights
from resmaster_stages.models.load import load_models
from resmaster_stages.models.samplers import sampler_name
from resmaster_stages.planning.drafts import draft_samples
from resmaster_stages.planning.preview import preview
from resmaster_stages.storage.images import encode_image
from resmaster_stages.storage.labels import Label, parameters
from tests.storage.test_labels import said, text_of, xmp_of
from tests.test_image_formats import configuration, members, photos

PROMPTS = {"prompts": "prompts.txt", "images": None, "low_res": {"steps": 2, "negative_prompt": "fog"}}
DRAWN = {"method": "multidiffusion", "scale": 2, "steps": 3, "guidance_scale": 2.5, "negative_prompt": "rain"}


def source_types(folder: Path, stage: str) -> set[str]:
    """The digital source types of the images of a stage; "" for images without XMP."""
    found = set()
    for name, data in members(folder, stage).items():
        if not name.endswith((".json", ".txt")):
            fields = said(xmp_of(data)) if "xmp" in Image.open(io.BytesIO(data)).info else {}
            term = next((value for tag, value in fields.items() if tag.endswith("DigitalSourceType")), "")
            found.add(term.rpartition("/")[2])
    return found


@pytest.mark.slow
def test_images_drawn_from_prompts_say_how(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red barn\n")
    path = configuration(tmp_path, **PROMPTS, image_format="png", upscale=DRAWN, captions={"source": "prompt"})
    assert main(["run", str(path)]) == 0
    low, high = members(tmp_path, "low_res"), members(tmp_path, "high_res")
    (key,) = {name.partition(".")[0] for name in low}
    facts = [json.loads(found[f"{key}.json"]) for found in (low, high)]
    size = f"{facts[0]['width']}x{facts[0]['height']}"
    assert text_of(low[f"{key}.png"]) == (
        f"a red barn\nNegative prompt: fog\nSteps: 2, Sampler: DDIM, CFG scale: 5, Seed: {facts[0]['seed']}, "
        f"Size: {size}, Model: picturebook"
    )
    assert text_of(high[f"{key}.png"]) == (
        f"a red barn\nNegative prompt: rain\nSteps: 3, Sampler: DDIM, CFG scale: 2.5, Seed: {facts[1]['seed']}, "
        f"Size: {size}, Model: picturebook, Hires upscale: 2, Hires upscaler: multidiffusion"
    )
    for stage in ("low_res", "high_res"):
        assert source_types(tmp_path, stage) == {"trainedAlgorithmicMedia"}
    packet = xmp_of(high[f"{key}.png"]).decode()
    for private in (str(tmp_path), "prompts.txt", "0.1.0", "202"):
        assert private not in packet


@pytest.mark.parametrize(
    ("upscale", "term"),
    [
        ({"method": "lanczos", "scale": 2}, "algorithmicallyEnhanced"),
        ({"method": "super_resolution", "scale": 2}, "compositeWithTrainedAlgorithmicMedia"),
    ],
)
def test_own_images_say_nothing_and_their_enlargements_say_what_was_done(upscale, term, tmp_path):
    photos(tmp_path / "in")
    assert main(["run", str(configuration(tmp_path, upscale=upscale))]) == 0
    assert source_types(tmp_path, "low_res") == {""}
    assert source_types(tmp_path, "high_res") == {term}


@pytest.mark.parametrize("value", ["source", "none"])
def test_less_is_said_if_that_is_asked_for(value, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red barn\n")
    values = {**PROMPTS, "upscale": {"method": "lanczos", "scale": 2}, "image_metadata": value}
    assert main(["run", str(configuration(tmp_path, **values))]) == 0
    term = {"source": "trainedAlgorithmicMedia", "none": ""}[value]
    for stage in ("low_res", "high_res"):
        assert source_types(tmp_path, stage) == {term}
        for name, data in members(tmp_path, stage).items():
            if name.endswith(".webp"):
                assert b"red barn" not in data
                assert b"EXIF" not in data
                assert (b"picturebook" in data) is (value == "source")


def without_the_field(dataset: Path) -> None:
    """Make a stored configuration one from before the field."""
    values = json.loads(unsigned((dataset / "config.json").read_bytes()))
    assert values.pop("image_metadata") == "none"
    (dataset / "config.json").write_bytes(signed(values, indent=2))


@pytest.fixture
def older(tmp_path) -> Path:
    """The configuration file of a dataset from before the field. The file does not name the field either."""
    photos(tmp_path / "in")
    assert main(["run", str(configuration(tmp_path, image_metadata="none"))]) == 0
    without_the_field(tmp_path / "out" / "d")
    return configuration(tmp_path)


def test_an_older_dataset_keeps_its_hashes_and_its_bytes(older, tmp_path, capsys):
    url = str(tmp_path / "out" / "d")
    assert load_config(older).image_metadata == "full", "the default of new datasets"
    assert open_dataset(url).config.image_metadata == "none"
    before = {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    assert all(not stage.samples_pending for stage in preview(load_config(older)).stages)
    for opened in (find_dataset, create_or_open, planned_dataset):
        assert opened(load_config(older)).config.image_metadata == "none"
    assert main(["plan", str(older)]) == 0
    assert main(["run", str(older)]) == 0
    assert {path: path.read_bytes() for path in Path(url).rglob("*.tar")} == {
        path: data for path, data in before.items() if path.suffix == ".tar"
    }
    (high,) = Path(url, "high_res").glob("*.tar")
    high.write_bytes(b"")
    assert main(["verify", url]) == 1
    assert main(["repair", url]) == 0
    assert high.read_bytes() == before[high]
    assert not Path(url, "configs").exists()


def test_an_older_dataset_changes_if_that_is_asked_for(older, tmp_path):
    path = configuration(tmp_path, image_metadata="source")
    assert any(stage.samples_pending for stage in preview(load_config(path)).stages)
    assert main(["run", str(path)]) == 0
    assert open_dataset(str(tmp_path / "out" / "d")).config.image_metadata == "source"
    again = configuration(tmp_path)
    assert main(["run", str(again)]) == 0
    assert open_dataset(str(tmp_path / "out" / "d")).config.image_metadata == "source", "it stays until it is set anew"
    assert [path.name for path in (tmp_path / "out" / "d" / "configs").iterdir()] == ["0001.json"]


def test_the_field_is_no_part_of_an_older_identity():
    """The hashes are those of a table of stages that does not know the field."""

    def hashes(**values: object) -> dict[str, str]:
        config = parse_config({"name": "d", "prompts": "p.txt", "upscale": {"method": "multidiffusion"}, **values})
        return hashes_of(config, Weights("m"))

    for source in ({}, {"images": "in", "prompts": None}):
        values = {each: hashes(image_metadata=each, **source) for each in ("none", "source", "full")}
        assert hashes(**source) == values["full"]
        for stage in ("low_res", "high_res", "quality"):
            assert len({found[stage] for found in values.values()}) == 3


def parts(part: type[Part]) -> set[type[Part]]:
    """All parts below a part of a configuration, those of methods left out."""
    fields = (field.annotation for field in part.model_fields.values())
    below = {each for kind in fields for each in (kind, *getattr(kind, "__args__", ())) if isinstance(each, type)}
    found = {each for each in below if issubclass(each, Part)}
    return found.union(*map(parts, found))


def test_only_the_whole_configuration_has_fields_that_stay():
    """`keeping` looks at no part below."""
    from resmaster_stages.config.method import methods

    below = parts(DatasetConfig) | {each for method in methods().values() for each in (method, *parts(method))}
    assert ModelConfig in below
    assert type_at(("upscale",), {}) in below
    assert not any(part.before() for part in below)
    assert DatasetConfig.before() == {"image_metadata": "none"}


def test_forms_do_not_send_the_default_along():
    """A form sends defaults as values, which would change an older dataset."""
    properties = DatasetConfig.model_json_schema()["properties"]
    assert "default" not in properties["image_metadata"]
    assert properties["image_format"]["default"] == "webp"


def test_samplers_have_the_names_of_other_programs():
    names = {
        model: [sampler_name(load_models(ModelConfig(id=model)).base, stepper, 4) for stepper in steppers]
        for model, steppers in {
            "picturebook": ("ddim_keep", "ddim_implied", "dpmpp_2m", "renoise", "posterior"),
            "picturebook-as-flow": ("ddim_keep", "dpmpp_2m"),
        }.items()
    }
    assert names["picturebook"] == ["DDIM", "DDIM", "DPM++ 2M", "LCM", "posterior"]
    assert names["picturebook-as-flow"] == ["Euler", "DPM++ 2M"]


def own_images(folder: Path) -> None:
    """Images of the user's that say their prompts themselves, in several ways."""
    folder.mkdir()

    def save(name: str, number: int, text: str) -> None:
        label = Label("trainedAlgorithmicMedia", parameters=text)
        (folder / name).write_bytes(encode_image(Image.new("RGB", (32, 32), (number, 9, 9)), "png", 100, label))

    save("said.png", 1, parameters("a red barn", "fog", {"Steps": 3, "Seed": 77}))
    save("text.png", 2, parameters("a red barn", "fog", {"Steps": 3, "Seed": 78}))
    (folder / "text.txt").write_text("a blue boat")
    save("blank.png", 3, parameters("a red barn", "fog", {"Steps": 3, "Seed": 79}))
    (folder / "blank.txt").write_text(" \n")
    save("long.png", 4, parameters("barn " * 500, "", {"Steps": 3, "Seed": 80}))
    save("bell.png", 5, parameters("a \x07 barn", "", {"Steps": 3, "Seed": 81}))


def test_prompts_are_read_from_own_images_unless_a_text_is_beside_them(tmp_path, capsys):
    own_images(tmp_path / "in")
    path = configuration(tmp_path, images=str(tmp_path / "in"))
    draft = draft_samples(load_config(path))
    found = {Path(sample.source).name: (sample.prompt, sample.negative_prompt) for sample in draft.samples}
    assert found == {
        "said.png": ("a red barn", "fog"),
        "text.png": ("a blue boat", ""),
        "blank.png": ("", ""),
        "long.png": ("", ""),
        "bell.png": ("", ""),
    }
    assert not draft.rejected
    told = "1 image has a prompt that is read from the image file; 2 images have a prompt in the image file that cannot"
    for verb in ("plan", "run"):
        assert main([verb, str(path)]) == 0
        out, err = capsys.readouterr()
        assert told in " ".join((out + err).split())
    facts = [json.loads(data) for name, data in members(tmp_path, "low_res").items() if name.endswith(".json")]
    assert {each["prompt"]: each["negative_prompt"] for each in facts} == {
        "a red barn": "fog",
        "a blue boat": "",
        "": "",
    }
    assert sorted(each["source_metadata"]["seed"] for each in facts) == [77, 78, 79, 80, 81]


def test_an_older_dataset_of_own_images_reads_nothing_from_them(tmp_path):
    """Else the same run would plan every image once more, under its prompt."""
    own_images(tmp_path / "in")
    assert main(["run", str(configuration(tmp_path, image_metadata="none"))]) == 0
    without_the_field(tmp_path / "out" / "d")
    before = open_dataset(str(tmp_path / "out" / "d")).plan.samples
    look = preview(load_config(configuration(tmp_path)))
    assert (look.new_samples, look.noticed) == (0, "")
    assert main(["run", str(configuration(tmp_path))]) == 0
    assert open_dataset(str(tmp_path / "out" / "d")).plan.samples == before == 5
    facts = [json.loads(data) for name, data in members(tmp_path, "low_res").items() if name.endswith(".json")]
    assert not any("source_metadata" in each or each["prompt"] == "a red barn" for each in facts)
