"""The summary of a build: numbers of what is published, and nothing from outside that acts as Markdown."""

from pathlib import Path

from resmaster_stages.inspection.status import status
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.markdown import cell
from resmaster_stages.publish.summary import summary
from tests.fake_stages import planned
from tests.inspection.test_explain import built


def test_the_summary_of_a_build(tmp_path: Path) -> None:
    dataset = built(tmp_path / "out", ["a", "bad high_res", "c"], tmp_path)
    write_manifest(dataset)
    page = summary(dataset, status(dataset))
    for line in (
        "| high\\_res | 2 | 0 | 0 | 2 | 1 | 0 s |",
        "| PSNR ↑ | 30.0 dB | 30.0 dB | 30.0 dB |",
        "Flagged: 0 of 2.",
        "## 1 failed samples",
        "| high\\_res | SampleError | told to fail |",
        f"`resmaster repair {dataset.url}`",
    ):
        assert line in page
    assert "CLIP" not in page, "what was not measured has no line"


def test_a_dataset_without_a_finished_sample(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a"], tmp_path)
    write_manifest(dataset)
    assert "No sample yet." in summary(dataset, status(dataset))


def test_text_from_outside_stays_text() -> None:
    assert cell("a | b\n<script>") == "a \\| b \\<script\\>"
    assert cell("![x](javascript:y) `c` &lt;") == "\\!\\[x\\](javascript:y) \\`c\\` &amp;lt;"
