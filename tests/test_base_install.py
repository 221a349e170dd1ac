"""The base install upscales an image. Whatever needs more says in one line which extra brings it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import resmaster_stages as rm
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
    assert {*EXTRAS["pipeline"], *EXTRAS["s3"]} <= hidden
    assert {"webdataset", "fastapi", "sqlalchemy", "httpx", "pytest"} <= hidden


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_what_is_looked_for(extra: str) -> None:
    lines = PROJECT["optional-dependencies"][extra]
    names = brought(lines) | {normal(Requirement(line).name) for line in lines}
    assert {normal(module) for module in EXTRAS[extra]} <= names


def test_the_command_upscales(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    words = ("upscale", str(photo), str(out), "--model", "picturebook", "--scale", "2", "--steps", "4")
    done = alone(COMMAND, *words)
    assert done.returncode == 0, done.stderr
    assert Image.open(out).size == (256, 256)
    assert np.asarray(Image.open(out)).std() > 1


def test_the_library_draws_and_upscales(photo: Path, tmp_path: Path) -> None:
    script = (
        "import sys, resmaster_stages as rm\n"
        "small, = rm.generate('a red house', steps=4)\n"
        "rm.upscale(small, 'a red house', scale=2, steps=4).save(sys.argv[2])\n"
        "assert rm.upscale(sys.argv[1], method='lanczos', scale=2).size == (256, 256)\n"
    )
    done = alone(script, str(photo), str(tmp_path / "out.png"))
    assert (done.returncode, done.stderr) == (0, ""), "no warnings either"
    assert Image.open(tmp_path / "out.png").size == (256, 256)


def test_each_other_function_names_the_extra_that_it_needs() -> None:
    script = (
        "import json, resmaster_stages as rm\n"
        "def said(name):\n"
        "    try: getattr(rm, name)\n"
        "    except rm.ResMasterError as error: return str(error)\n"
        "print(json.dumps({name: said(name) for name in rm._HOMES}))\n"
    )
    done = alone(script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name, said in found.items() if said is None} >= {"ResMasterError", "generate", "upscale"}
    remedy = "needs the extra pipeline; install it with: pip install 'resmaster-pipeline[pipeline]'"
    assert {name: said for name, said in found.items() if said is not None} == {
        name: f"resmaster_stages.{name} {remedy}" for name in rm._PIPELINE
    }


def test_a_store_names_its_extra() -> None:
    script = (
        "from resmaster_stages.errors import UserError\n"
        "from resmaster_stages.storage.filesystem import open_root\n"
        "try: open_root('s3://bucket/prefix')\n"
        "except UserError as error: print(error)\n"
    )
    assert alone(script).stdout == (
        "s3://bucket/prefix needs the extra s3; install it with: pip install 'resmaster-pipeline[s3]'\n"
    )


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
    assert {verb.name: verb.extra for verb in verbs if verb.extra != "pipeline"} == {"app": "app"}
    remedy = "needs the extra {0}; install it with: pip install 'resmaster-pipeline[{0}]'"
    assert done.stderr.splitlines() == [
        line for verb in verbs for line in (f"resmaster: {verb.name} {remedy.format(verb.extra)}", f"{verb.name} 2")
    ]


def test_help_and_version_import_little() -> None:
    script = (
        "import sys; from resmaster_flows.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    for word in ("--help", "--version"):
        done = alone(script, word)
        imported = done.stderr.split()
        assert "rich" in imported
        assert {"torch", "diffusers", "transformers", "numpy", "PIL", "pydantic", "yaml", "fsspec"}.isdisjoint(imported)


def test_init_says_what_the_next_command_needs(tmp_path: Path) -> None:
    done = alone(COMMAND, "init", str(tmp_path / "demo"))
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == (
        f"next: pip install 'resmaster-pipeline[pipeline]' && resmaster run {tmp_path / 'demo' / 'picturebook.yaml'}"
    )


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
