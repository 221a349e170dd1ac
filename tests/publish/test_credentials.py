"""Content credentials: found by bytes alone where the library of C2PA writes them, and signed and read back with a
certificate that the test makes."""

import io
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resmaster_flows.cli.main import main
from resmaster_stages.config.load import load_config
from resmaster_stages.errors import UserError
from resmaster_stages.planning.preview import preview
from resmaster_stages.publish.credentials import Credentials, Ingredient, SigningKey, read, sign
from resmaster_stages.storage.credentials import embedded_credentials
from resmaster_stages.storage.images import decode_image, encode_image
from resmaster_stages.storage.labels import Label
from tests.checkout import ROOT
from tests.fake_stages import png
from tests.test_image_formats import configuration, members

EXTENSIONS = ("png", "webp", "avif", "jxl", "jpg")
GENERATED = "trainedAlgorithmicMedia"


def name(who: str) -> x509.Name:
    parts = {NameOID.COUNTRY_NAME: "DE", NameOID.ORGANIZATION_NAME: "Test Press", NameOID.COMMON_NAME: who}
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts.items()])


def certificate(key, who: str, authority) -> x509.Certificate:
    """As C2PA asks for: a signature key for one of the uses that it knows, or an authority (who: "root")."""
    root, now = who == "root", datetime.now(UTC)
    usage = dict.fromkeys(
        (
            *("content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "encipher_only", "decipher_only"),
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder(name("root"), name(who), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=root, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not root, key_cert_sign=root, crl_sign=root, **usage), critical=True
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if not root:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(authority, hashes.SHA256())


def pem(key) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def signing_key(key) -> SigningKey:
    authority = ec.generate_private_key(ec.SECP256R1())
    chain = [certificate(key, "signer", authority), certificate(authority, "root", authority)]
    return SigningKey(b"".join(each.public_bytes(serialization.Encoding.PEM) for each in chain), pem(key))


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return signing_key(ec.generate_private_key(ec.SECP256R1()))


def picture(extension: str, label: Label | None = None) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    if extension != "jpg":
        return encode_image(image, extension, 100, label)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("label", [None, Label(GENERATED, "m", "a barn", "a barn\nSteps: 1")], ids=["", "labelled"])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_image_is_signed_and_read_back(extension, label, key):
    plain = picture(extension, label)
    signed = sign(plain, extension, key, title="barn.png", source_type=GENERATED)
    assert read(signed, extension) == Credentials("Valid", "Test Press", "barn.png", GENERATED, ())
    assert decode_image(signed, "x").tobytes() == decode_image(plain, "x").tobytes()
    assert read(plain, extension) is None
    assert len(signed) - len(plain) < 5_000, "no thumbnail is in it"
    if label is not None and extension != "jpg":
        assert b"trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>" in signed, "the label stays"


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_the_bytes_that_are_found_are_those_that_the_library_reads(extension, key):
    import c2pa

    signed = sign(picture(extension), extension, key, title="barn", source_type=GENERATED)
    found = embedded_credentials(signed)
    assert embedded_credentials(picture(extension)) == b""
    apart = c2pa.Reader("image/" + extension.replace("jpg", "jpeg"), io.BytesIO(picture(extension)), found)
    assert apart.get_active_manifest()["title"] == "barn", "the manifest store alone, beside the unsigned image"


def test_the_code_of_the_docs_runs(key, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "provenance.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    files = {"chain.pem": key.certificates, "key.pem": key.private_key, "photo-4x.webp": picture("webp")}
    for file, content in {**files, "photo.jpg": picture("jpg")}.items():
        Path(file).write_bytes(content)
    exec(code, {})
    assert "state='Valid'" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.95])
def test_a_change_after_the_signature_is_noticed(place, key):
    signed = bytearray(sign(picture("png"), "png", key, title="barn", source_type=GENERATED))
    start = signed.index(b"IDAT") + 4
    signed[start + round((len(signed) - start - 20) * place)] ^= 1
    assert read(bytes(signed), "png").state == "Invalid"


def test_the_credentials_of_the_users_image_become_part_of_those_of_its_enlargement(key):
    own = sign(picture("jpg"), "jpg", key, title="photo.jpg", source_type="digitalCapture")
    signed = sign(
        picture("webp"),
        "webp",
        key,
        title="photo-4x.webp",
        source_type="compositeWithTrainedAlgorithmicMedia",
        ingredient=Ingredient(own, "jpg", "photo.jpg"),
    )
    expected = ("Valid", "Test Press", "photo-4x.webp", "compositeWithTrainedAlgorithmicMedia", ("photo.jpg",))
    assert read(signed, "webp") == Credentials(*expected)
    assert embedded_credentials(signed).count(b"digitalCapture") == 1, "the whole history is there"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: ed25519.Ed25519PrivateKey.generate(),
        lambda: rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "Ed25519", "RSA"],
)
def test_keys_of_other_kinds(make):
    signed = sign(picture("png"), "png", signing_key(make()), title="barn", source_type=GENERATED)
    assert read(signed, "png").state == "Valid"


def test_the_private_key_is_shown_nowhere(key):
    assert "PRIVATE" not in repr(key)


def test_what_cannot_be_signed_is_told_in_one_line(key, monkeypatch):
    def refused(data=None, extension="png", with_key=key) -> str:
        with pytest.raises(UserError) as error:
            sign(data or picture("png"), extension, with_key, title="barn", source_type=GENERATED)
        assert "\n" not in str(error.value)
        assert "PRIVATE" not in str(error.value)
        return str(error.value)

    other = signing_key(ec.generate_private_key(ec.SECP256R1()))
    assert "cannot be signed; use one of png, webp, avif, jxl" in refused(extension="gif")
    assert refused(data=b"no image").startswith("barn: content credentials failed (")
    assert "private key cannot be read" in refused(with_key=SigningKey(key.certificates, b"no key"))
    assert refused(with_key=SigningKey(b"no certificate", key.private_key)).startswith("barn: content credentials")
    assert refused(with_key=SigningKey(other.certificates, key.private_key)).startswith("barn: content credentials")
    weak = pem(dsa.generate_private_key(1024))
    assert "of no kind that C2PA knows" in refused(with_key=SigningKey(key.certificates, weak))
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert refused() == "content credentials need the library of C2PA; pip install 'resmaster-pipeline[c2pa]'"


def test_the_credentials_of_own_images_are_told_and_recorded(tmp_path: Path, key, capsys):
    (tmp_path / "in").mkdir()
    signed = {each: sign(picture(each), each, key, title="x", source_type="digitalCapture") for each in EXTENSIONS}
    for extension, data in signed.items():
        (tmp_path / "in" / f"{extension}.{extension}").write_bytes(data)
    (tmp_path / "in" / "plain.png").write_bytes(png((1, 2, 3), (64, 48)))
    path = configuration(tmp_path)
    assert preview(load_config(path)).noticed == "5 images have content credentials (C2PA), which results do not carry"
    assert main(["run", str(path)]) == 0
    assert "5 images have content credentials (C2PA), which results do not carry" in " ".join(
        capsys.readouterr().err.split()
    )
    made = members(tmp_path, "low_res")
    recorded = [json.loads(data).get("source_metadata") for name, data in made.items() if name.endswith(".json")]
    assert sorted(each["credentials"]["bytes"] for each in recorded if each) == sorted(
        len(embedded_credentials(data)) for data in signed.values()
    )
    assert recorded.count(None) == 1
    assert not any(embedded_credentials(data) for data in made.values())


@given(st.sampled_from(EXTENSIONS), st.binary(max_size=40), st.integers(0, 3000))
def test_damaged_files_end_the_search(extension, junk, place):
    data = picture(extension)
    found = embedded_credentials(data[:place] + junk + data[place + len(junk) :])
    assert isinstance(found, bytes)
    embedded_credentials(data[:place])
