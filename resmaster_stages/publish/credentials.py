"""Signs images with content credentials (C2PA) by the user's own key, and reads such credentials: the extra `c2pa`.

Signed bytes differ every time: they hold a time and random numbers. So images are signed on their way out, and never in
the shards of a dataset.

This module fetches nothing: no credentials that a file only links to, and no revocation lists. Only a timestamp is
asked for, if the user names a service.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from resmaster_stages.errors import UserError
from resmaster_stages.redaction import one_line
from resmaster_stages.storage.labels import SOURCE_TYPES, TOOL

EXTRA = "pip install 'resmaster-pipeline[c2pa]'"
MEDIA_TYPES = {
    **{"png": "image/png", "webp": "image/webp", "avif": "image/avif", "jxl": "image/jxl"},
    **{"jpg": "image/jpeg", "jpeg": "image/jpeg"},
}
"""Extension of an image that can be signed -> its media type."""
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
_JXL_MARK = b"\xff\x0a"
_JXL_HEAD = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\x14ftypjxl \0\0\0\0jxl "


@dataclass(frozen=True)
class SigningKey:
    """What the user signs with."""

    certificates: bytes
    """The chain in PEM, the signer's own certificate first."""
    private_key: bytes = field(repr=False)
    """In PEM, without a password."""
    timestamp_url: str | None = None
    """A service (RFC 3161) that signs the time, so that signatures outlive the certificate. None: no time is signed."""


@dataclass(frozen=True)
class Ingredient:
    """The user's own image, from which the signed image was made. Its credentials become part of the new ones."""

    data: bytes
    extension: str
    title: str


@dataclass(frozen=True)
class Credentials:
    """The content credentials of an image."""

    state: str
    """`Trusted`, `Valid` (whole, by a signer that is on no list), or `Invalid` (changed since it was signed)."""
    issuer: str
    title: str
    source_type: str
    """The term of `SOURCE_TYPES`; "" if none is stated."""
    ingredients: tuple[str, ...]
    """Titles of the images from which it was made."""


def sign(
    data: bytes,
    extension: str,
    key: SigningKey,
    *,
    title: str,
    source_type: str,
    ingredient: Ingredient | None = None,
) -> bytes:
    """The image file with credentials that say how it was made. Pixels and other metadata stay.

    source_type: a term of `SOURCE_TYPES`. ingredient: given for an image that was made from the user's own.
    Raises UserError if the extra is not installed, or if the key, the certificates or the image cannot be used.
    """
    media_type = _media_type(extension)
    action = {
        "action": "c2pa.created" if ingredient is None else "c2pa.edited",
        "digitalSourceType": SOURCE_TYPES + source_type,
    }
    manifest = {
        "claim_generator_info": [{"name": TOOL}],
        "title": title,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    signed = io.BytesIO()
    with _library(title) as c2pa, c2pa.Builder(manifest, _context(c2pa)) as builder:
        if ingredient is not None:
            builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
            described = {"title": ingredient.title, "relationship": "parentOf"}
            builder.add_ingredient(described, _media_type(ingredient.extension), io.BytesIO(ingredient.data))
        builder.sign(_signer(c2pa, key), media_type, io.BytesIO(_in_container(data)), signed)
    return signed.getvalue()


def read(data: bytes, extension: str) -> Credentials | None:
    """The credentials that are embedded in an image file, checked. None if there are none. Raises UserError."""
    with _library("the image") as c2pa:
        stream = io.BytesIO(_in_container(data))
        reader = c2pa.Reader.try_create(_media_type(extension), stream, context=_context(c2pa))
        if reader is None:
            return None
        with reader:
            state, active = str(reader.get_validation_state()), reader.get_active_manifest()
    actions = [
        action
        for assertion in active.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"]["actions"]
    ]
    terms = [str(action["digitalSourceType"]) for action in actions if "digitalSourceType" in action]
    return Credentials(
        state=state,
        issuer=one_line(active.get("signature_info", {}).get("issuer", "")),
        title=one_line(active.get("title", "")),
        source_type=one_line(terms[-1].rpartition("/")[2]) if terms else "",
        ingredients=tuple(one_line(each.get("title", "")) for each in active.get("ingredients", ())),
    )


def _media_type(extension: str) -> str:
    if extension.lower() not in MEDIA_TYPES:
        raise UserError(f".{extension}: images of this kind cannot be signed; use one of {', '.join(MEDIA_TYPES)}")
    return MEDIA_TYPES[extension.lower()]


def _in_container(data: bytes) -> bytes:
    """An image file that can hold credentials: a bare JPEG XL is put into a container."""
    if not data.startswith(_JXL_MARK):
        return data
    return _JXL_HEAD + (8 + len(data)).to_bytes(4, "big") + b"jxlc" + data


@contextmanager
def _library(name: str) -> Iterator[Any]:
    """The library of C2PA. Its errors in the block become UserErrors that begin with `name`."""
    try:
        import c2pa
    except ImportError:
        raise UserError(f"content credentials need the library of C2PA; {EXTRA}") from None
    try:
        yield c2pa
    except c2pa.C2paError as error:
        raise UserError(
            f"{name}: content credentials failed ({one_line(error)}); check the image, the key and its certificates"
        ) from error


def _context(c2pa: Any) -> Any:
    return c2pa.Context.from_dict(_SETTINGS)


def _signer(c2pa: Any, key: SigningKey) -> Any:
    info = c2pa.C2paSignerInfo(_algorithm(key.private_key), key.certificates, key.private_key, key.timestamp_url)
    return c2pa.Signer.from_info(info)


def _algorithm(private_key: bytes) -> bytes:
    """The name of the signature algorithm that fits a key. Raises UserError."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(private_key, password=None)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the private key cannot be read ({one_line(error)}); give a PEM file without a password"
        ) from None
    if isinstance(loaded, ec.EllipticCurvePrivateKey):
        name = {256: b"es256", 384: b"es384", 521: b"es512"}.get(loaded.curve.key_size)
    elif isinstance(loaded, rsa.RSAPrivateKey):
        name = b"ps256"
    else:
        name = b"ed25519" if isinstance(loaded, ed25519.Ed25519PrivateKey) else None
    if name is None:
        raise UserError("the private key is of no kind that C2PA knows; use an elliptic curve (P-256), Ed25519 or RSA")
    return name
