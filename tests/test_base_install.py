"""The base install upscales an image. Whatever needs more says in one line which extra brings it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resmaster_flows.cli.main import VERBS
from resmaster_stages.errors import EXTRAS
from tests.base_install import PROJECT, brought, normal, other_modules
from tests.checkout import ROOT
from tests.flows.cli.test_any_arguments import USUAL

COMMAND = "import sys; from resmaster_flows.cli.main import main; sys.exit(main(sys.argv[1:]))"


def alone(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script with the packages of the base install."""
    command = [sys.executable, "-m", "tests.base_install", script, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((128, 128), 60).convert("RGB").save(path)
    return path


def test_what_is_hidden() -> None:
    """The packages of every extra, and none of the base install."""
    hidden = other_modules()
    assert {"torch", "diffusers", "transformers", "PIL", "pydantic", "rich", "yaml"}.isdisjoint(hidden)
    assert {module for modules in EXTRAS.values() for module in modules} - {"gradio"} <= hidden
    assert {"webdataset", "fastapi", "sqlalchemy", "httpx", "pytest"} <= hidden


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_what_is_looked_for(extra: str) -> None:
    names = brought(PROJECT["optional-dependencies"][extra])
    assert {normal(module) for module in EXTRAS[extra]} <= names


def test_the_command_upscales(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    words = ("upscale", str(photo), str(out), "--model", "picturebook", "--scale", "2", "--steps", "4")
    done = alone(COMMAND, *words)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (256, 256)
    assert np.asarray(Image.open(out)).std() > 1


EACH = """
import contextlib, json, sys
from resmaster_flows.cli.main import main
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit):
        print(words[0], main(words), file=sys.stderr)
"""


def test_each_other_verb_names_the_extra_that_it_needs() -> None:
    verbs = [verb for verb in VERBS if verb.extra]
    assert {verb.name for verb in VERBS} - {verb.name for verb in verbs} == {"init", "upscale", "schema", "completion"}
    done = alone(EACH, json.dumps([[verb.name, *USUAL[verb.name]] for verb in verbs]))
    assert done.returncode == 0, done.stderr
    remedy = "needs the extra pipeline; install it with: pip install 'resmaster-pipeline[pipeline]'"
    assert done.stderr.splitlines() == [
        line for verb in verbs for line in (f"resmaster: {verb.name} {remedy}", f"{verb.name} 2")
    ]


def test_each_verb_has_its_help() -> None:
    done = alone(EACH, json.dumps([[verb.name, "--help"] for verb in VERBS]))
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("usage: ")] == [
        verb.name for verb in VERBS
    ]


def test_only_the_module_of_the_verb_that_is_used_is_imported() -> None:
    script = (
        "import sys; from resmaster_flows.cli.main import VERBS, parser\n"
        "def used(): return [each.name for each in VERBS if f'resmaster_flows.cli.{each.name}' in sys.modules]\n"
        "parser().format_help(); assert used() == [], used()\n"
        "parser().parse_args(['explain', 'out/demo', '0']); assert used() == ['explain'], used()\n"
    )
    done = alone(script)
    assert done.returncode == 0, done.stderr
