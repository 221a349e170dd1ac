"""What stages see of a sample, and what they give back for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.errors import SampleError
from resmaster_stages.storage.images import decode_image


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image as it lies in a shard."""

    data: bytes
    extension: str
    """webp, png or jpg."""
    meta: dict[str, Any]
    """The sample's JSON."""
    _decoded: list[Image.Image] = field(default_factory=list, compare=False, repr=False)

    def open(self) -> Image.Image:
        """The image as RGB, fully decoded. Raises SampleError if it cannot be decoded or is far too large."""
        return self._decoded.pop() if self._decoded else self._decode()

    def decode_ahead(self) -> None:
        """Decode the image for the next `open`, which is where errors are raised."""
        with suppress(Exception):
            self._decoded.append(self._decode())

    def _decode(self) -> Image.Image:
        return decode_image(self.data, str(self.meta.get("key", "image")))


@dataclass(frozen=True)
class Sample:
    """What a stage sees of one sample. Upstream parts are None or () where the stage does not depend on them."""

    key: str
    index: int
    """Position in the whole dataset."""
    prompt: str
    negative_prompt: str
    """The prompt's own; "" if it brought none."""
    height: int
    """Low-res height in px."""
    width: int
    """Low-res width in px."""
    replica: int
    source: str | None = None
    """Where a user's image came from (`storage.images.read_image` reads it); of a prompt, its detail mask
    (`storage.masks.read_mask`), None where it has none."""
    low_res: EncodedImage | None = None
    detail_mask: EncodedImage | None = None
    """Kept with the low-res image; None where there is none."""
    captions: tuple[dict[str, Any], ...] = ()
    """Rows of the captions table, by (row, col)."""
    high_res: EncodedImage | None = None


@dataclass(frozen=True)
class Output:
    """What a stage yields for one sample: files (or how to make them), rows, or the error that it failed with."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Stages that write tars: extension -> content."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Stages that write tables: rows without their key."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)
    """Feature vectors, kept in an object of their own; every good sample of a shard has the same ones, or none has
    any."""
    error: Exception | None = None
    finish: Callable[[], dict[str, bytes]] | None = field(default=None, compare=False)
    """Makes `files` where that takes time and no device (encoding, hashing), in another thread while the next sample is
    computed."""

    def finished(self) -> Output:
        """The output with its files made. A SampleError on the way becomes its error; any other error is raised."""
        if self.finish is None:
            return self
        try:
            return replace(self, files=self.finish(), finish=None)
        except SampleError as error:
            return Output(self.key, error=error)
