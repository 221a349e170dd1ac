"""The snippets of docs/exporting.md read back what the commands of the page write, each by its library."""

import re
import shlex
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.curation import read_choices
from resmaster_stages.publish.exports.export import export
from resmaster_stages.publish.exports.record import Options
from tests.checkout import ROOT
from tests.publish.exports.common import built, choose

PAGE = (ROOT / "docs" / "exporting.md").read_text()
SNIPPETS = {
    library: next(
        block for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE) if mark in block
    )
    for library, mark in {
        "datasets": "load_dataset",
        "streaming": "from streaming",
        "litdata": "from litdata",
    }.items()
}


@pytest.mark.parametrize("library", SNIPPETS)
def test_the_snippet_runs(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pytest.importorskip(
        library, reason=f"{library} is not installed; docs/exporting.md says when it was tried"
    )
    monkeypatch.chdir(tmp_path)
    if library == "datasets":
        monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = built("out", tmp_path, name="picturebook")
    for form in ("imagefolder", "mds", "litdata"):
        export(dataset, f"exports/{form}", Options(form))
    exec(compile(SNIPPETS[library], library, "exec"), {})
    assert "(64, 64) a house" in capsys.readouterr().out


def test_the_command_reads_what_was_chosen_in_fiftyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall("^resmaster curate .*--import.*$", PAGE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    dataset = built("out", tmp_path, name="picturebook")
    choose(dataset, "a house", "kept", 4)
    export(dataset, "from-fiftyone", Options("fiftyone"))
    for name in dataset.folder.names("curation"):
        dataset.folder.remove(name)
    dataset.folder.remove("curation.parquet")
    assert main([*shlex.split(line)[1:], "--who", "ann"]) == 0
    (choice,) = read_choices(dataset.folder).values()
    assert (choice.verdict, choice.rating, choice.who) == ("kept", 4, "ann")
