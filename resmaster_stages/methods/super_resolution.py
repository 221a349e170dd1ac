"""Super-resolution (SDXL + BSRGAN in the papers' tables): one pass of a network that was trained to enlarge images.

There is no diffusion and no prompt. The network keeps and sharpens what the low-res image shows, and adds nothing else.
It is the sanity baseline of every generative upscaler.

The network has a factor of its own (4, or 2). Larger targets take several passes. A result that is larger than the
target is reduced by antialiased bicubic interpolation (the papers do not say how they reached other factors).

Images are processed in tiles with a halo, so memory depends on the tile alone. Invariant: with a halo as wide as the
network's receptive field, tiling changes nothing. The rim of the receptive field weighs next to nothing, so a halo of a
few pixels is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from PIL import Image
from pydantic import Field, model_validator

from resmaster_stages.config.method import register
from resmaster_stages.config.part import Operational
from resmaster_stages.diffusion.views import Grid
from resmaster_stages.errors import SampleError
from resmaster_stages.methods.settings import Enlargement
from resmaster_stages.models.identity import NetworkFile, network_identity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from resmaster_stages.diffusion.loop import Progress
    from resmaster_stages.models.enlarger import Enlarger


@register
class SuperResolution(Enlargement):
    """One pass of a network that was trained to enlarge images: it sharpens what is there and adds nothing."""

    places: ClassVar[tuple[str, ...]] = ("model", "weight_name", "revision")

    in_floats: ClassVar[bool] = True
    method: Literal["super_resolution"] = "super_resolution"
    model: str = "picturebook"
    """The network: `picturebook` (the embedded pack's, for its own world), a file of weights such as BSRGAN.safetensors
    or BSRGAN.pth, or a hub id together with `weight_name`."""
    weight_name: str | None = None
    """File of the weights on the hub."""
    revision: str | None = None
    """Commit or tag on the hub."""
    allow_pickle: bool = Operational(False)
    """Allow a .pth file. Only its tensors are read, and no code in it runs."""
    tile: int = Field(default=256, ge=16)
    """Edge in px of the tiles of the low-res image that go through the network, halo included. Lower the value if
    memory runs out."""
    halo: int = Field(default=16, ge=0)
    """Border in px of each tile that the network sees but that does not go into the result. With 16, differences of one
    level of 255 remain."""

    @model_validator(mode="after")
    def _check_tile(self) -> Self:
        if self.tile <= 2 * self.halo:
            raise ValueError(f"tile ({self.tile}) must be greater than two halos ({2 * self.halo})")
        return self

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        if self.model == "picturebook":
            return self
        name = self.weight_name or self.model
        if not name.endswith(".safetensors") and not self.allow_pickle:
            raise ValueError(
                f"{name} is not a .safetensors file; choose one that is, or set allow_pickle: true for a .pth file "
                "that you trust (its tensors alone are read)"
            )
        return self

    def network(self) -> NetworkFile:
        """The place of the network's weights."""
        return NetworkFile(self.model, self.weight_name, self.revision)

    def weights(self) -> str:
        """The identity of the network's weights."""
        return network_identity(self.network())

    def check_files(self) -> None:
        """Raise ConfigError if the network's file is missing, cut off or of an unknown kind."""
        from resmaster_stages.models.enlarger import check_network

        check_network(self.network())

    def facts(self) -> dict[str, Any]:
        """The settings that reports show."""
        return {"network": self.model}

    def networks(self) -> tuple[tuple[str, str, str | None], ...]:
        """The network."""
        return (("super-resolution network", self.model, self.revision),)

    def enlarge(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Image.Image:
        """`image` at `height` x `width` px by the network. `progress` is called with (tiles done, tiles in all).

        Raises ConfigError (weights that cannot be read, too little memory), SampleError (a result that is not finite)
        and GpuLost.
        """
        from resmaster_stages.diffusion.reference import to_image

        return to_image(self.unrounded(image, height, width, device, dtype, progress) * 2 - 1)

    def unrounded(
        self,
        image: Image.Image,
        height: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> Tensor:
        """As `enlarge`, before values are rounded to 8 bits: [3, height, width], float32 from 0 to 1. Raises what
        `enlarge` raises."""
        from resmaster_stages.models.busy import busy
        from resmaster_stages.models.enlarger import load_enlarger
        from resmaster_stages.models.faults import device_faults

        enlarger = load_enlarger(self.network(), device, dtype)
        with busy(), device_faults("lower upscale.tile"):
            pixels = enlarged(enlarger, image, height, width, self, progress)
        if not pixels.isfinite().all():
            raise SampleError("the network produced NaN or infinite values; try model.dtype: float32 or bfloat16")
        return pixels.float().clamp(0, 1)


def tile_grid(height: int, width: int, settings: SuperResolution) -> Grid:
    """Tiles of an image, halo included. Neighbouring tiles overlap by two halos."""
    return Grid(height, width, settings.tile, settings.tile - 2 * settings.halo)


def cores(origins: tuple[int, ...], window: int, halo: int) -> list[tuple[int, int]]:
    """The part [start, end) of an axis that each tile contributes: all but a halo at the tile's inner borders."""
    starts: list[int] = []
    ends: list[int] = []
    for number, origin in enumerate(origins):
        last = number == len(origins) - 1
        starts.append(ends[-1] if ends else 0)
        ends.append(origin + window - (0 if last else halo))
    return list(zip(starts, ends))


def tiled(
    enlarge: Callable[[Tensor], Tensor],
    scale: int,
    pixels: Tensor,
    settings: SuperResolution,
    tick: Callable[[], None],
) -> Tensor:
    """`pixels` [1, 3, h, w] through `enlarge`, tile by tile: [1, 3, scale h, scale w]."""
    grid = tile_grid(pixels.shape[-2], pixels.shape[-1], settings)
    large = pixels.new_empty(1, 3, grid.height * scale, grid.width * scale)
    columns = list(zip(grid.cols, cores(grid.cols, grid.window_width, settings.halo)))
    for y, (top, bottom) in zip(grid.rows, cores(grid.rows, grid.window_height, settings.halo)):
        for x, (left, right) in columns:
            made = enlarge(pixels[..., y : y + grid.window_height, x : x + grid.window_width])
            inside = made[..., (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
            large[..., top * scale : bottom * scale, left * scale : right * scale] = inside
            tick()
    return large


def sizes(height: int, width: int, scale: float, factor: int) -> list[tuple[int, int]]:
    """(height, width) of the input of each pass on the way to `scale` times the size. There is at least one pass."""
    passes = [(height, width)]
    while factor ** len(passes) < scale * (1 - 1e-9):
        passes.append((passes[-1][0] * factor, passes[-1][1] * factor))
    return passes


def enlarged(
    enlarger: Enlarger,
    image: Image.Image,
    height: int,
    width: int,
    settings: SuperResolution,
    progress: Progress | None = None,
) -> Tensor:
    """`image` at `height` x `width` px by `enlarger`: [3, height, width], about 0 to 1.

    `progress` is called with (tiles done, tiles in all).
    """
    import torch.nn.functional as F

    from resmaster_stages.diffusion.reference import pad_to_multiple, to_tensor

    multiple = enlarger.multiple
    pixels = to_tensor(image) / 2 + 0.5
    passes = sizes(image.height, image.width, settings.scale, enlarger.scale)
    padded_sizes = ((-(-rows // multiple) * multiple, -(-cols // multiple) * multiple) for rows, cols in passes)
    total = sum(len(tile_grid(rows, cols, settings)) for rows, cols in padded_sizes)
    done = count(1)

    def tick() -> None:
        if progress:
            progress(next(done), total)

    for rows, cols in passes:
        padded = pad_to_multiple(pixels, multiple)
        large = tiled(enlarger, enlarger.scale, padded, settings, tick)
        pixels = large[..., : rows * enlarger.scale, : cols * enlarger.scale].clamp(0, 1)
    if pixels.shape[-2:] != (height, width):
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return pixels[0]
