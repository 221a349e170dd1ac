"""Captions: read in the background, found by a search, and missing ones told."""

from pathlib import Path

import pytest

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.storage.filesystem import Folder
from tests.gallery.conftest import Opener
from tests.gallery.standin import standin
from tests.gallery.test_samples import found, manifest


def test_a_search_finds_captions(made: Dataset, opened: Opener) -> None:
    row = manifest(made)[2]
    _, client = opened(made)
    assert found(client, q="CORNER 11") == [0, 1, 2, 3, 4, 5]
    assert found(client, q=f"corner {row['key'][:4].upper()}") == [2], (
        "the stand-in's captions hold the key's beginning"
    )
    assert found(client, q=row["key"][:9].upper()) == [2], "the key's own beginning"
    assert found(client, q=f"corner {row['prompt'].split()[-1]}") == [2], "a word of the prompt and one of the captions"
    assert found(client, q=row["key"][1:9]) == []
    assert client.get("api/dataset").json()["captions"] == {"indexed": 2, "shards": 2, "error": ""}


def test_captions_that_describe_nothing_are_not_searched(
    made: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the global prompt stands in for a caption, only the prompt counts."""
    monkeypatch.setattr("resmaster_stages.gallery.captions.DESCRIBED", ("replaced",))
    _, client = opened(made)
    assert found(client, q="corner") == []
    assert client.get("api/dataset").json()["captions"]["indexed"] == 2


def test_a_table_that_is_gone_or_damaged_is_told(
    own: Dataset, opened: Opener, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = manifest(own)
    names = sorted({row["captions_object"] for row in rows})
    own.folder.remove(names[0])
    path = Path(own.folder.full(names[1]))
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    _, client = opened(own)
    state = client.get("api/dataset").json()["captions"]
    assert (state["indexed"], state["shards"]) == (0, 2)
    assert "the captions of 2 shards cannot be searched" in state["error"]
    assert "resmaster verify" in state["error"]
    assert "not a readable Parquet file" in capsys.readouterr().err
    first, last = client.get(f"api/sample/{rows[0]['key']}"), client.get(f"api/sample/{rows[-1]['key']}")
    assert (first.status_code, last.status_code) == (404, 502)
    assert f"{names[0]} is gone; run: resmaster verify" in first.json()["error"]
    assert found(client) == [0, 1, 2, 3, 4, 5]


def test_a_store_that_cannot_be_reached_is_told(own: Dataset, opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(self: Folder, names: list[str], lenient: bool = False) -> dict[str, bytes]:
        raise ConnectionError("s3://b: cannot be reached; check the network")

    with monkeypatch.context() as patch:
        patch.setattr("resmaster_stages.gallery.gallery.status", lambda dataset: (_ for _ in ()).throw(OSError("down")))
        patch.setattr(Folder, "read_many", lambda self, names, lenient=False: down(self, names) if lenient else {})
        _, client = opened(own)
    about = client.get("api/dataset").json()
    assert "cannot be reached; check the network" in about["captions"]["error"]
    assert "not known whether the publication is up to date: down" in about["note"]


def test_the_background_stops_when_the_server_stops(own: Dataset, tmp_path: Path, opened: Opener) -> None:
    from resmaster_stages.gallery.gallery import open_gallery

    dataset = standin(tmp_path / "many", tmp_path, 3000, captioned=3000)
    with open_gallery(dataset, "ann") as gallery:
        gallery.captions.stop()
    assert not gallery.background.is_alive()
    _, client = opened(dataset)
    assert client.get("api/dataset").json()["captions"] == {"indexed": 3, "shards": 3, "error": ""}
    assert len(found(client, q="corner", limit=200)) == 200
