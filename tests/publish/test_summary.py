"""The summary of a build: numbers of what is published, and nothing from outside that acts as Markdown."""

from pathlib import Path

from resmaster_stages.dataset.attempts import record_failure
from resmaster_stages.dataset.dataset import reconfigured
from resmaster_stages.errors import GpuLost
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


def test_the_summary_says_what_it_has_cost(tmp_path: Path) -> None:
    """By stage and in all, with the time that failed attempts took."""
    dataset = built(tmp_path / "out", ["a", "b"], tmp_path)
    write_manifest(dataset)
    low_res = dataset.commits("low_res")
    record_failure(low_res, 0, "0" * 8, GpuLost("gone"), {}, seconds=7200.0)
    assert "| low\\_res | 2.00 h | 2.00 h | 0.0 s |" in summary(dataset, status(dataset))
    priced = reconfigured(dataset, dispatch=dataset.config.dispatch.model_copy(update={"price": 3.0}))
    page = summary(priced, status(priced))
    assert "| low\\_res | 2.00 h | 2.00 h | 0.0 s | 6.00 |" in page
    assert "In all: 2.00 h of device time, 6.00 at 3 an hour. Not counted: " in page


def test_a_dataset_without_a_finished_sample(tmp_path: Path) -> None:
    dataset = planned(tmp_path / "out", ["a"], tmp_path)
    write_manifest(dataset)
    assert "No sample yet." in summary(dataset, status(dataset))


def test_text_from_outside_stays_text() -> None:
    assert cell("a | b\n<script>") == "a \\| b \\<script\\>"
    assert cell("![x](javascript:y) `c` &lt;") == "\\!\\[x\\](javascript:y) \\`c\\` &amp;lt;"
