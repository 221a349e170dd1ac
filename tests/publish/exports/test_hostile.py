"""Every prompt is data, in every format: it comes back as it is, and never becomes a name."""

import json
from pathlib import Path

import pytest

from resmaster_stages.keys import normalise_prompt
from resmaster_stages.publish.exports import FORMATS
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.record import Options
from tests.publish.exports.common import built, rows_of, visible
from tests.publish.exports.test_packed import samples
from tests.test_security import ATTACKS

PROMPTS = [
    *(each for each in ATTACKS if "\x00" not in each),
    "../../etc/passwd",
    'it\'s "quoted" \\ and \\n a # comment: [x] {y} %s',
    "''' \"\"\" --- !!python/object:os.system",
    "\u202eltr\u2066 and \u200b nothing",
    "=cmd|' /C calc'!A0, a, b",
    "ünïcödé 猫 🐈‍⬛",
    "{a|b} <lora:x:1>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All prompts in all formats."""
    folder = tmp_path_factory.mktemp("hostile")
    dataset = built(folder / "out", folder, PROMPTS)
    assert [row["prompt"] for row in rows_of(dataset)] == [normalise_prompt(each) for each in PROMPTS]
    for form in FORMATS:
        export(dataset, str(folder / form.name), Options(form.name))
    return folder


WANTED = [normalise_prompt(each) for each in PROMPTS]


def prompts_of(folder: Path, form: str) -> list[str]:
    if form in ("mds", "litdata"):
        return [sample["prompt"].decode() for sample in samples(folder)]
    if form == "imagefolder":
        return [json.loads(line)["text"] for line in (folder / "metadata.jsonl").open(encoding="utf-8", newline="\n")]
    if form == "fiftyone":
        return [sample["prompt"] for sample in json.loads((folder / "samples.json").read_text())["samples"]]
    found = []
    for path in folder.rglob("*.txt"):
        with path.open(encoding="utf-8") as file:
            (line,) = file.readlines()  # one line for every reader, whatever the prompt holds
        found.append(line.removesuffix("\n"))
    return sorted(found, key=WANTED.index)


@pytest.mark.parametrize("form", [each.name for each in FORMATS])
def test_prompts_come_back_as_they_are(folder: Path, form: str) -> None:
    assert prompts_of(folder / form, form) == WANTED


@pytest.mark.parametrize("form", [each.name for each in FORMATS])
def test_no_name_holds_a_prompt(folder: Path, form: str) -> None:
    for name in visible(folder / form):
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._/-"), name
    assert not list(folder.glob("passwd*"))


def test_datasets_reads_them_too(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed (extra dev)")
    data = str(folder / "imagefolder")
    found = datasets.load_dataset("imagefolder", data_dir=data, split="train", cache_dir=str(tmp_path))
    assert found["prompt"][:] == WANTED
