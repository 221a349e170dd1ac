"""The links by which a published dataset is opened."""

from __future__ import annotations

import re
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import s3fs

from resmaster_stages.dataset import layout
from resmaster_stages.publish.links import SIGNED_SECONDS, VIEW_URL, report_page, view_lines
from resmaster_stages.redaction import holds_credentials
from tests.fake_stages import planned


def test_a_dataset_in_a_folder_is_opened_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VIEW_URL, raising=False)
    dataset = planned(tmp_path / "my sets", ["a"], tmp_path)
    assert list(view_lines(dataset)) == [
        f"look through all samples on your own machine: `resmaster view '{tmp_path}/my sets/demo'`",
        f"report: `{tmp_path}/my sets/demo/report/index.html`",
    ]
    assert report_page(dataset) == "".join(f"- {line}\n" for line in view_lines(dataset)), "a folder signs nothing"


@pytest.mark.parametrize("address", ["http://127.0.0.1:8080/token", "https://host/token/"])
def test_a_running_view_is_linked(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VIEW_URL, address)
    dataset = planned(tmp_path, ["a"], tmp_path)
    assert next(view_lines(dataset)) == f"[look through all samples]({address.rstrip('/')}/demo/)"
    monkeypatch.setenv(VIEW_URL, "localhost:8080")
    assert (
        next(view_lines(dataset)) == "RESMASTER_VIEW_URL has no http:// or https://, so there is no link to all samples"
    )


@pytest.mark.s3
def test_the_report_on_s3_has_a_signed_link_that_a_browser_opens(s3_root: str, tmp_path: Path) -> None:
    dataset = planned(s3_root, ["a"], tmp_path)
    page = b"<html>the report</html>"
    dataset.folder.write(layout.REPORT_PAGE, page)
    text = report_page(dataset)
    found = re.match(r"- \[open the report\]\(([^)\s]+)\): works until (.+) UTC\. ", text)
    assert found
    with urllib.request.urlopen(found[1]) as answer:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert answer.read() == page
    until = datetime.strptime(found[2], "%Y-%m-%d %H:%M").replace(tzinfo=UTC)
    assert abs(until - datetime.now(UTC) - timedelta(seconds=SIGNED_SECONDS)) < timedelta(minutes=5)
    assert f"`resmaster view {dataset.url}`" in text
    assert holds_credentials(found[1]), "so it is hidden wherever it is no link that somebody asked for"


def test_a_store_that_signs_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = planned(tmp_path, ["a"], tmp_path)

    def refuse(*arguments: object) -> None:
        raise ConnectionError("no credentials")

    monkeypatch.setattr(type(dataset.folder), "signed_url", refuse)
    assert "- no signed link to the report: no credentials\n" in report_page(dataset)


@pytest.mark.s3
def test_a_token_of_temporary_credentials_is_not_shown(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = planned(s3_root, ["a"], tmp_path)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-token")
    s3fs.S3FileSystem.clear_instance_cache()
    text = report_page(dataset)
    assert text.startswith("- no signed link to the report, because it would hold the token of temporary credentials\n")
    assert "canary-token" not in text
