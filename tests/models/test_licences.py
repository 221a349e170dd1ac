"""Licences of models: what a card states, what the table knows, and what is never guessed."""

import os
from pathlib import Path

import pytest

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.models.licences import HUB, KNOWN, LONGEST_HEADER_BYTES, Licence, licence_of, licences_of

FLUX = "black-forest-labs/FLUX.1-dev"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, model: str, card: bytes, revision: str = "a" * 40, branch: str = "main") -> None:
    """Put a card into a cache, as the hub's library does."""
    place = cache / f"models--{model.replace('/', '--')}"
    (place / "snapshots" / revision).mkdir(parents=True)
    (place / "snapshots" / revision / "README.md").write_bytes(card)
    (place / "refs").mkdir()
    (place / "refs" / branch).write_text(revision)


def folder(tmp_path: Path, card: bytes) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_bytes(card)
    return str(tmp_path / "model")


def configured(**values: object) -> DatasetConfig:
    return parse_config({"name": "demo", **values})


def test_the_embedded_model_has_the_licence_of_this_project() -> None:
    assert licence_of("picturebook") == Licence("apache-2.0")


def test_a_card_in_the_models_folder(tmp_path: Path) -> None:
    card = b"---\nlicense: openrail++\ntags:\n- text-to-image\n---\n# A model\n"
    assert licence_of(folder(tmp_path, card)) == Licence("openrail++")


def test_a_licence_that_hubs_have_no_name_for(tmp_path: Path, cache: Path) -> None:
    card = b"\xef\xbb\xbf---\r\nlicense: other\r\nlicense_name: my-licence-1.0\r\nlicense_link: LICENSE.md\r\n---\r\n"
    assert licence_of(folder(tmp_path, card)) == Licence("my-licence-1.0")
    cached(cache, "owner/name", card)
    assert licence_of("owner/name").link == f"{HUB}owner/name/blob/main/LICENSE.md"
    other = card.replace(b"LICENSE.md", b"https://example.org/licence?v=2")
    assert licence_of(folder(tmp_path / "hub", other)) == Licence("my-licence-1.0", "https://example.org/licence?v=2")


def test_the_card_of_the_revision_is_read(cache: Path) -> None:
    cached(cache, "owner/name", b"---\nlicense: mit\n---\n", revision="b" * 40, branch="old")
    assert licence_of("owner/name", "old") == licence_of("owner/name", "b" * 40)
    assert licence_of("owner/name", "old") == Licence("mit", f"{HUB}owner/name")
    assert licence_of("owner/name") == Licence(None), "another revision may have another licence"


def test_a_card_counts_more_than_the_table(cache: Path) -> None:
    assert licence_of(FLUX) == Licence("flux-1-dev-non-commercial-license", f"{HUB}{FLUX}")
    assert licence_of(FLUX.upper()).name == "flux-1-dev-non-commercial-license", "hubs do not mind capitals"
    cached(cache, FLUX, b"---\nlicense: apache-2.0\n---\n")
    assert licence_of(FLUX).name == "apache-2.0"


def test_a_card_without_a_licence_leaves_it_to_the_table(cache: Path) -> None:
    cached(cache, "Qwen/Qwen-Image", b"---\ntags: [image]\n---\nlicense: mit\n")
    cached(cache, "owner/name", b"---\ntags: [image]\n---\nlicense: mit\n")
    assert licence_of("Qwen/Qwen-Image").name == "apache-2.0"
    assert licence_of("owner/name") == Licence(None)


@pytest.mark.parametrize("model", ["owner/name", "no id", "/gone/FLUX.1-dev", "https://example.org/x", "a" * 300])
def test_nothing_is_guessed_and_nothing_is_raised(model: str) -> None:
    assert licence_of(model) == Licence(None)
    assert licence_of(model).sentence() == "not stated; read the model's page"


DEEP = b"[" * 5000
BOMB = b"".join(b"x%d: &x%d {<<: [%s]}\n" % (n, n, b", ".join([b"*x%d" % (n - 1)] * 9)) for n in range(1, 40))


@pytest.mark.parametrize(
    "header",
    [
        b"license: 3",
        b"license: 2024-13-45",
        b"license: " + b"9" * 10_000,
        b"license: true",
        b"license:",
        b"license: null",
        b"license: {name: mit}",
        b"license: []",
        b"license: [mit, [mit]]",
        b"license: " + b"mit " * 5000,
        b"license: a|b",
        b"license: <b>mit</b>",
        b"license: '`mit`'",
        b'license: "mit\\nlicense"',
        b'license: "mit\\u202e"',
        b"license: [mit, apache-2.0",
        b"license: *nothing",
        b"? [license]\n: mit",
        b"- license\n- mit",
        b"mit",
        b"license: \xff\xfe",
        b"license: " + DEEP,
        b"x0: &x0 {a: b}\n" + BOMB,
        b"x: " + b"y" * LONGEST_HEADER_BYTES + b"\nlicense: mit",
    ],
    ids=range(24),
)
def test_an_odd_header_states_nothing(tmp_path: Path, header: bytes) -> None:
    assert licence_of(folder(tmp_path, b"---\n" + header + b"\n---\n")) == Licence(None)


def test_a_header_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    licence_of(folder(tmp_path, f"---\nlicense: !!python/object/apply:os.mkdir [{made}]\n---\n".encode()))
    assert not made.exists()


@pytest.mark.parametrize("card", [b"", b"license: mit\n", b"---\nlicense: mit\n", b"\n---\nlicense: mit\n---\n", b"\0"])
def test_a_card_without_a_header_states_nothing(tmp_path: Path, card: bytes) -> None:
    assert licence_of(folder(tmp_path, card)) == Licence(None)


def test_a_card_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "README.md").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "README.md")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "README.md").symlink_to(tmp_path / "gone")
    assert {licence_of(str(tmp_path / name)) for name in "abc"} == {Licence(None)}


@pytest.mark.parametrize(
    "link",
    [
        "javascript:alert(1)",
        "../../etc/passwd",
        "https://example.org/a) [b](https://example.org/c",
        "https://user:password@example.org/licence",
        "https://example.org/?token=abcdefgh",
        "https://example.org/" + "a" * 400,
        "[x]",
        "{a: b}",
        "3 4",
    ],
)
def test_an_odd_link_is_left_out(tmp_path: Path, cache: Path, link: str) -> None:
    cached(cache, "owner/name", f"---\nlicense: mit\nlicense_link: {link}\n---\n".encode())
    assert licence_of("owner/name") == Licence("mit", f"{HUB}owner/name")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cc-by-nc-4.0", True),
        ("CC BY-NC-SA 4.0", True),
        ("sai-nc-community", True),
        ("stabilityai-nc-research-community", True),
        ("flux-1-dev-non-commercial-license", True),
        ("fair-noncommercial-research-license", True),
        ("Non Commercial", True),
        ("apache-2.0", False),
        ("openrail++", False),
        ("stabilityai-ai-community", False),
        ("license of Ink Inc", False),
        (None, False),
    ],
)
def test_non_commercial_licences_are_recognised(name: str | None, expected: bool) -> None:
    licence = Licence(name)
    assert licence.non_commercial is expected
    assert ("does not allow commercial use" in licence.sentence()) is expected


def test_several_licences(tmp_path: Path) -> None:
    found = licence_of(folder(tmp_path, b"---\nlicense:\n- mit\n- cc-by-nc-4.0\n---\n"))
    assert (found.name, found.non_commercial) == ("mit and cc-by-nc-4.0", True)


def test_the_table_can_be_looked_up() -> None:
    for model, name in KNOWN.items():
        assert model == model.lower()
        assert model.count("/") == 1
        assert licence_of(model) == Licence(name, f"{HUB}{model}")


def parts(**values: object) -> dict[str, str]:
    return {each.part: each.model for each in licences_of(configured(**values))}


def test_only_models_that_are_used_are_named() -> None:
    adapter = {"id": "h94/IP-Adapter", "weight_name": "a.safetensors"}
    model = {"id": FLUX, "vae": "owner/vae", "ip_adapter": adapter}
    every = {"base model": FLUX, "VAE": "owner/vae", "IP-Adapter": "h94/IP-Adapter", "captioner": "picturebook"}
    assert parts(model=model) == every
    assert parts(model=model, images="my-images") == every
    assert parts(model=model, captions={"source": "server", "base_url": "http://a/v1"}).keys() == every.keys() - {
        "captioner"
    }
    plain = {"base model": FLUX, "VAE": "owner/vae"}
    network = {"super-resolution network": "picturebook"}
    for method, own in (("direct", {}), ("lanczos", {}), ("super_resolution", network)):
        assert parts(model=model, upscale={"method": method}) == {**plain, **own}, "the model drew the low-res images"
    assert parts(model=model, upscale={"method": "direct"}, images="my-images") == plain
    for method, own in (("lanczos", {}), ("super_resolution", network)):
        assert parts(model=model, upscale={"method": method}, images="my-images") == own
    for name, licence in (("owner/network", None), ("tianweiy/DMD2", "cc-by-nc-4.0"), ("/gone/network.pth", None)):
        upscale = {"method": "super_resolution", "model": name, "weight_name": "x.safetensors"}
        (found,) = licences_of(parse_config({"name": "demo", "images": "my-images", "upscale": upscale}))
        assert (found.part, found.model, found.licence.name) == ("super-resolution network", name, licence)
    enlarger = {"enlarge": "network", "model": "owner/enlarger", "weight_name": "x.safetensors"}
    assert parts(upscale={"method": "direct", "init": "noised_lr", "start": 0.5, "reference": enlarger}).keys() == {
        "base model",
        "network that enlarges latents",
    }
    assert "IP-Adapter" not in parts(model=model, upscale={"image_prompt": {"enabled": False}})
