"""The input (`Sample`) and the output (`Output`) of a stage for one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from resmaster_stages.dataset.batches import Batch
from resmaster_stages.errors import SampleError
from resmaster_stages.storage.images import decode_image

DESCRIBED = ("ok", "replaced")
"""Statuses of captions that describe a patch. With any other status the row holds the global prompt."""


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image as it is stored in a shard."""

    data: bytes
    extension: str
    """One of `storage.shards.IMAGE_EXTENSIONS`."""
    meta: dict[str, Any]
    """The content of the sample's JSON file."""
    _decoded: list[Image.Image] = field(default_factory=list, compare=False, repr=False)

    def open(self) -> Image.Image:
        """The image as RGB, fully decoded. Raises SampleError if it cannot be decoded or has too many pixels."""
        return self._decoded.pop() if self._decoded else self._decode()

    def decode_ahead(self) -> None:
        """Decode the image now, for the next `open`. An error is raised by that `open`, not here."""
        with suppress(Exception):
            self._decoded.append(self._decode())

    def _decode(self) -> Image.Image:
        return decode_image(self.data, str(self.meta.get("key", "image")))


@dataclass(frozen=True)
class Sample:
    """The input of a stage for one sample. Upstream parts are None or () if the stage does not read them."""

    key: str
    index: int
    """Position in the whole dataset."""
    prompt: str
    negative_prompt: str
    """The prompt's own negative prompt; "" if it has none."""
    height: int
    """Low-res height in px."""
    width: int
    """Low-res width in px."""
    replica: int
    source: str | None = None
    """For a user's image: where it is (`storage.sources.read_image` reads it). For a prompt: where its detail mask is
    (`storage.masks.read_mask`), or None."""
    low_res: EncodedImage | None = None
    detail_mask: EncodedImage | None = None
    """The detail mask, stored with the low-res image; None if there is none."""
    captions: tuple[dict[str, Any], ...] = ()
    """Rows of the captions table, by (row, col)."""
    high_res: EncodedImage | None = None
    take: int = 0
    """How often the sample was asked for again with a new seed, up to this stage; a part of `sample_seed`."""


@dataclass(frozen=True)
class Output:
    """The output of a stage for one sample: files (or a function that makes them), rows, or the sample's error."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """For stages that write tars: extension -> content."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """For stages that write tables: rows without the key."""
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict, compare=False)
    """Feature vectors, stored in an object of their own. All good samples of a shard have arrays of the same names, or
    none has any."""
    error: Exception | None = None
    batch_size: int | None = field(default=None, compare=False)
    """Items per call of the device, from a stage that chooses the number where the configuration leaves it open."""
    batch: Batch | None = None
    """How the sample was computed. The runner sets it."""
    finish: Callable[[], dict[str, bytes]] | None = field(default=None, compare=False)
    """Makes `files`, if that takes time but no device (encoding, hashing). It runs in another thread while the next
    sample is computed."""

    def finished(self) -> Output:
        """The output with its files made. A SampleError becomes the output's error; any other error is raised."""
        if self.finish is None:
            return self
        try:
            return replace(self, files=self.finish(), finish=None)
        except SampleError as error:
            return Output(self.key, error=error)
