"""The base model of a dataset: which weights, from where, onto which device."""

from __future__ import annotations

from typing import Any, Literal

from resmaster_stages.config.part import Operational, Part

SDXL: dict[str, Any] = {
    "id": "stabilityai/stable-diffusion-xl-base-1.0",
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "ip_adapter": {
        "id": "h94/IP-Adapter",
        "subfolder": "sdxl_models",
        "weight_name": "ip-adapter_sdxl_vit-h.safetensors",
        "image_encoder_folder": "models/image_encoder",
    },
}
"""The model part of a configuration for SDXL with image prompts."""


class IpAdapterConfig(Part):
    """Where the IP-Adapter and its image encoder come from."""

    id: str
    """Hub id or folder, e.g. `h94/IP-Adapter`."""
    subfolder: str = ""
    """Folder of the adapter's weights inside it, e.g. `sdxl_models`."""
    weight_name: str
    """File of the adapter's weights, e.g. `ip-adapter_sdxl_vit-h.safetensors`."""
    image_encoder_folder: str = "image_encoder"
    """Folder of the CLIP image encoder inside it, e.g. `models/image_encoder`."""
    revision: str | None = None
    """Commit or tag at the hub."""


class ModelConfig(Part):
    """Which weights are loaded, from where, and onto which device."""

    id: str = "picturebook"
    """`picturebook` (the embedded pack), a hub id such as `stabilityai/stable-diffusion-xl-base-1.0`, or a folder."""
    revision: str | None = None
    """Commit or tag at the hub. Name one: it is part of the dataset's identity."""
    variant: str | None = None
    """Weight variant, e.g. `fp16`."""
    vae: str | None = None
    """Another VAE by hub id or folder, e.g. `madebyollin/sdxl-vae-fp16-fix`."""
    ip_adapter: IpAdapterConfig | None = None
    """Image prompts. The picturebook pack brings its own adapter and needs nothing here."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float16 on CUDA, float32 elsewhere. Beside `bfloat16` the VAE stays in float32."""
    device: str = Operational("auto")
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    offload: Literal["none", "model"] = Operational("none")
    """`model`: keep only the part at work on the GPU; slower, needs less memory."""
    compile: Literal["auto", "blocks", "off"] = Operational("auto")
    """`blocks`: the UNet's transformer blocks are compiled at first use (about a minute), each shape once; where a
    method changes them, they run as they are. `auto`: on CUDA."""
    exactness: Literal["bytes", "fast"] = Operational("bytes")
    """`bytes`: a re-run on the same kind of machine gives the same bytes. `fast`: cuDNN chooses convolutions by a race,
    so bytes may differ by rounding. Commit records say which."""
    quantise: Literal["none", "fp8"] = "none"
    """`fp8`: the UNet's large linear layers compute in 8 bits, on CUDA from compute capability 8.9 on, compiled. Needs
    the extra `fp8`."""

    def identity(self) -> dict[str, Any]:
        """As of every part; without quantising it is what it was before there was any."""
        values = super().identity()
        if self.quantise == "none":
            del values["quantise"]
        return values
