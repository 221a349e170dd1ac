"""`import resmaster_stages as rm`: the public functions, their page, and what they say of mistakes."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.errors import ConfigError, UserError
from tests.checkout import PYTHONPATH, ROOT

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
FUNCTIONS = [name for name in rm._HOMES if name[0].islower()]


def photo(size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.effect_noise(size, 60).convert("RGB")


def test_there_are_eight_documented_functions_with_an_example_each() -> None:
    assert len(FUNCTIONS) == 8
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
    assert set(sections) == set(FUNCTIONS)
    for name in FUNCTIONS:
        assert getattr(rm, name).__doc__, name
        assert f"rm.{name}(" in sections[name], name
    assert set(rm._HOMES) <= set(dir(rm))
    with pytest.raises(AttributeError, match=r"it has: .*upscale"):
        _ = rm.upscal


def test_the_names_that_type_checkers_see_are_those_that_are_there() -> None:
    text = Path(rm.__file__).read_text(encoding="utf-8")
    imported = re.findall(r"^    from resmaster_stages\.(\S+) import (.+)$", text, flags=re.MULTILINE)
    found = {name.partition(" as ")[0]: home for home, names in imported for name in names.split(", ")}
    assert found == rm._HOMES


def test_a_star_import_leaves_the_builtin_open_alone() -> None:
    space: dict[str, Any] = {}
    exec("from resmaster_stages import *", space)
    assert set(rm.__all__) == set(rm._HOMES) - {"open"}
    assert "open" not in space
    assert space["upscale"] is rm.upscale


def test_the_import_is_light() -> None:
    code = (
        "import sys, resmaster_stages as rm; light = {'pydantic', 'PIL', 'numpy', 'yaml'} & set(sys.modules);"
        "[getattr(rm, name) for name in rm._HOMES];"
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'prefect', 'sqlalchemy'} & set(sys.modules);"
        "sys.exit(repr(light | heavy) if light | heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": PYTHONPATH})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, with few steps and small images."""
    monkeypatch.chdir(tmp_path)
    for name in ("deployments", "resmaster_stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    photo((48, 32)).save("photo.png")
    quick = 'limit=2, low_res={"steps": 2}, upscale={"steps": 2, "scale": 2}, on_sample'
    text = PAGE.replace("scale=4)", "scale=4, steps=2)").replace("limit=2, on_sample", quick)
    space: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        exec(re.sub(r"steps=\d+", "steps=2", block), space)
    assert Image.open("photo-4x.png").size == (192, 128)
    assert len(space["previews"]) == 2, "all steps are fewer than the example's third"
    assert len(space["dataset"]) == 2
    assert space["explanation"].sample.key == space["sample"].key


def test_upscale_takes_files_images_and_any_method(tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    heard: list[tuple[int, int]] = []
    made = rm.upscale(tmp_path / "photo.png", method="super_resolution", progress=lambda *seen: heard.append(seen))
    assert made.size == (128, 96)
    assert heard[-1][0] == heard[-1][1]
    assert rm.upscale(photo().convert("L"), method="lanczos", scale=2).mode == "RGB"


def test_captions_are_taken_and_seeds_count() -> None:
    settings: dict[str, Any] = {"method": "c_upscale", "scale": 2, "steps": 4}
    image = photo((64, 64))
    plain = rm.upscale(image, "a red house", captions="prompt", **settings)
    assert rm.upscale(image, "a red house", captions=["a red house"], **settings).tobytes() == plain.tobytes()
    assert rm.upscale(image, "a red house", captions=["a cat"], **settings).tobytes() != plain.tobytes()
    assert rm.upscale(image, "a red house", captions="prompt", seed=1, **settings).tobytes() != plain.tobytes()


MISTAKES: list[tuple[Callable[[], object], type[UserError], str]] = [
    (lambda: rm.upscale("nope.png"), UserError, "nope.png: no such image file"),
    (lambda: rm.upscale(__file__), UserError, "convert it to PNG or JPEG"),
    (
        lambda: rm.upscale(3),
        UserError,
        "a path, a PIL image, a numpy array, a torch tensor, or a list of these, not int",
    ),
    (lambda: rm.upscale(photo(), stepz=3), ConfigError, "unknown key 'upscale.stepz' (did you mean 'steps'?); method"),
    (lambda: rm.upscale(photo(), method="magic"), ConfigError, "unknown method 'magic'; known: direct"),
    (lambda: rm.upscale(photo(), method=["direct"]), ConfigError, "unknown method"),
    (lambda: rm.upscale(photo(), scale=0.5), ConfigError, "upscale.scale: "),
    (lambda: rm.upscale(photo(), model="./nowhere"), ConfigError, "./nowhere: no such folder; check the path"),
    (lambda: rm.upscale(photo(), model=3), ConfigError, "is a int, and the known families of base models are SDXL"),
    (lambda: rm.upscale(photo((64, 64)), captions=["a"]), ConfigError, "give one per view, or none"),
    (lambda: rm.upscale(photo(), method="direct", captions=["a"]), ConfigError, "method direct reads none"),
    (lambda: rm.generate("a house", height=33), ConfigError, "33 is no multiple of 8; use 32 or 40"),
    (
        lambda: rm.generate("a house", stepz=3),
        ConfigError,
        "unknown key 'low_res.stepz' (did you mean 'steps'?)",
    ),
    (lambda: rm.measure("nope.png", photo()), UserError, "nope.png: no such image file"),
    (lambda: rm.open("nowhere"), ConfigError, "no dataset here"),
    (lambda: rm.load_config("nowhere.yaml"), ConfigError, "no such configuration file"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(
    call: Callable[[], object], error: type[UserError], message: str
) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_captioner_by_name_needs_a_model_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are counted by the model's tokenizer, which is looked up by name."""
    from dataclasses import replace

    models = replace(rm.load(rm.load_config(ROOT / "deployments/datasets/picturebook.yaml").model), identity="mine")
    with pytest.raises(ConfigError, match="needs a model that is given by name"):
        rm.upscale(photo(), model=models, captions="picturebook")
