"""A published dataset, and a server for it that is called without a socket."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.gallery.app import Server
from resmaster_stages.gallery.gallery import Gallery, open_gallery
from resmaster_stages.gallery.guard import Guard
from tests.gallery.standin import built

TOKEN, PORT = "token-of-the-tests", 8765
BASE = f"http://127.0.0.1:{PORT}/{TOKEN}/"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six published samples of 1024 px, which tests only read."""
    folder = tmp_path_factory.mktemp("gallery")
    return built(folder / "out", folder, side=1024)


@pytest.fixture
def own(tmp_path: Path) -> Dataset:
    """Six published samples of 64 px, which a test may change."""
    return built(tmp_path / "out", tmp_path)


Opener = Callable[[Dataset], tuple[Gallery, TestClient]]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """Opens a dataset: its gallery, whose captions are all read, and a client."""
    with ExitStack() as stack:

        def start(dataset: Dataset, who: str = "ann") -> tuple[Gallery, TestClient]:
            gallery = stack.enter_context(open_gallery(dataset, who))
            server = Server(gallery)
            stack.callback(server.close)
            gallery.background.join()
            return gallery, TestClient(Guard(server.app, TOKEN, PORT), base_url=BASE, follow_redirects=False)

        yield start


@pytest.fixture
def client(made: Dataset, opened: Opener) -> TestClient:
    """A client of a server of `made`."""
    return opened(made)[1]
