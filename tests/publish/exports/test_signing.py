"""`resmaster export --sign-with`: exported images carry content credentials, the dataset's own never do."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from resmaster_flows.cli.main import main
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.publish.credentials import read
from resmaster_stages.storage.images import decode_image
from tests.publish.exports.common import NAMES, built, image_of, key_of, visible
from tests.publish.test_credentials import signing_key

Files = tuple[str, str]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("signing")
    return built(folder / "out", folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The certificates and the key, as PEM files."""
    folder, key = tmp_path_factory.mktemp("keys"), signing_key(ec.generate_private_key(ec.SECP256R1()))
    (folder / "chain.pem").write_bytes(key.certificates)
    (folder / "key.pem").write_bytes(key.private_key)
    return str(folder / "chain.pem"), str(folder / "key.pem")


def export(dataset: Dataset, target: Path, *more: str) -> int:
    return main(["export", dataset.url, str(target), "--as", "folder", *more])


def test_every_image_is_signed(dataset: Dataset, files: Files, tmp_path: Path) -> None:
    assert export(dataset, tmp_path / "x", "--sizes", "full,32", "--sign-with", *files) == 0
    for prompt in NAMES:
        key = key_of(dataset, prompt)
        for folder in ("full", "32"):
            signed = (tmp_path / "x" / folder / f"{key}.png").read_bytes()
            found = read(signed, "png")
            assert found is not None
            assert (found.state, found.title, found.source_type) == ("Valid", f"{key}.png", "trainedAlgorithmicMedia")
            if folder == "full":
                own = image_of(dataset, prompt)
                assert decode_image(signed, "x").tobytes() == decode_image(own, "x").tobytes()
                assert read(own, "png") is None, "what is committed never changes"


def test_a_second_run_signs_nothing_again(
    dataset: Dataset, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(dataset, tmp_path / "x", "--sign-with", *files) == 0
    before = {name: (tmp_path / "x" / name).read_bytes() for name in visible(tmp_path / "x")}
    assert export(dataset, tmp_path / "x", "--sign-with", *files) == 0
    assert before == {name: (tmp_path / "x" / name).read_bytes() for name in before}
    capsys.readouterr()
    assert export(dataset, tmp_path / "x") == 2
    assert "Traceback" not in capsys.readouterr().err, "an export without signatures is another one"


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_keys_that_cannot_be_used_are_one_line_before_anything_is_written(
    dataset: Dataset,
    files: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: int,
    content: bytes | None,
) -> None:
    given = list(files)
    given[wrong] = str(tmp_path / "wrong.pem")
    if content is not None:
        Path(given[wrong]).write_bytes(content)
    assert export(dataset, tmp_path / "x", "--sign-with", *given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()
