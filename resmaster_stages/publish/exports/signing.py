"""Signs exported images with content credentials (C2PA) by the user's key."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.labels import GENERATED, high_res_source_type
from resmaster_stages.dataset.sample import Sample
from resmaster_stages.errors import UserError, first_line
from resmaster_stages.publish.credentials import Ingredient, SigningKey, sign


@dataclass(frozen=True)
class Signer:
    """Signs the images of one export."""

    key: SigningKey

    @property
    def fingerprint(self) -> str:
        """The sha256 of the certificates, which says who signed an export."""
        return hashlib.sha256(self.key.certificates).hexdigest()

    def signed(self, image: bytes, extension: str, sample: Sample, config: DatasetConfig) -> bytes:
        """The image file with credentials. The user's own low-res image is the one that it was made from."""
        ingredient = None
        if config.images and sample.low_res is not None:
            low = sample.low_res
            ingredient = Ingredient(low.data, low.extension, f"{sample.key} (low-res)")
        return sign(
            image,
            extension,
            self.key,
            title=f"{sample.key}.{extension}",
            source_type=high_res_source_type(config),
            ingredient=ingredient,
        )


def signer_of(certificates: str, private_key: str) -> Signer:
    """The signer with the key in two PEM files. Raises UserError if they cannot be used: an image is signed to try."""
    signer = Signer(SigningKey(_content(certificates), _content(private_key)))
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    sign(small.getvalue(), "png", signer.key, title="--sign-with", source_type=GENERATED)
    return signer


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--sign-with {path}: cannot be read ({first_line(error)}); give a PEM file") from error
