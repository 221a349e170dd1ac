"""docs/methods.md and docs/speed.md: a section per method, a word on every knob, commands and settings that are
understood."""

import inspect
import re
import shlex

import pytest
import yaml
from PIL import Image

from benchmarks.methods import options
from resmaster_flows.cli.main import parser
from resmaster_stages.config.load import load_config
from resmaster_stages.config.method import Method, methods
from resmaster_stages.evaluation.variants import variants
from tests.checkout import ROOT

PAGE = (ROOT / "docs" / "methods.md").read_text()
SPEED = (ROOT / "docs" / "speed.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))


def lines(page: str, start: str) -> list[str]:
    """Commands of the page's code blocks that start so."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    text = "\n".join(block for language, block in blocks if language in ("", "bash"))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.startswith(start)]


@pytest.mark.parametrize("method", methods())
def test_every_method_has_a_section_with_its_use_cost_failure_and_knobs(method: str) -> None:
    section = SECTIONS[method]
    for word in ("Use it", "Cost", "Known failure", "Knobs"):
        assert f"**{word}**" in section, word
    known = methods()[method]
    own = inspect.get_annotations(known).keys() & known.model_fields.keys() - {"method"}
    for name in own:
        assert re.search(rf"`{name}[`:.]", section), name
    presets = known.presets
    if presets.keys() - {"default"} and presets.get("faithful") != presets.get("default"):
        assert "**Presets**" in section
    for preset in presets.keys() - {"default"}:
        assert f"`{preset}`" in section
    if "faithful" in presets and presets["faithful"] != presets["default"]:
        assert "**Differs from the authors' code**" in section


def test_the_table_of_uses_names_every_method() -> None:
    assert set(re.findall(r"\*\*([a-z_]+)\*\*", PAGE[: PAGE.index("## direct")])) == set(methods())


CONTROLLED = (":control.enabled=false", "", ":init=noise:start=0")
"""What the images of the section on ControlNets show, as `compare` takes it after the method."""


def test_settings_and_commands_are_understood() -> None:
    (snippet,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    Method.model_validate(yaml.safe_load(snippet)["upscale"])
    for command in re.findall(r"`(resmaster upscale .*?)`", PAGE):
        if "..." not in command and command.count(".png") > 1:
            parser().parse_args(shlex.split(command)[1:])
    shown = []
    for command in lines(PAGE, "resmaster compare "):
        args = parser().parse_args(shlex.split(command)[1:])
        found = variants(load_config(ROOT / args.config), args.methods, args.scales)
        shown.append([variant.method for variant in found])
    assert shown == [list(methods()), [f"multidiffusion{which}" for which in CONTROLLED]]
    for command in lines(SPEED, "python benchmarks/methods.py"):
        options().parse_args(shlex.split(command)[2:])
    assert len(lines(SPEED, "python benchmarks/methods.py")) == 2


def test_links_and_images_are_there() -> None:
    for page in (PAGE, SPEED):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            if "://" not in target:
                assert (ROOT / "docs" / target).is_file(), target
    for method in methods():
        path = f"images/methods/{method}.jpg"
        assert f"({path})" in SECTIONS[method]
        with Image.open(ROOT / "docs" / path) as image:
            assert image.width > 700


def test_the_speed_table_has_every_method() -> None:
    rows = re.findall(r"^\| ([a-z_]+) \|", SPEED, flags=re.MULTILINE)
    assert [name for name in rows if name in methods()][: len(methods())] == list(methods())
