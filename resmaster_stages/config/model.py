"""The part `model` of a configuration: the base model's weights, their source, and the device."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from resmaster_stages.config.part import Later, Operational, Part

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
    """The source of the adapter for image prompts and of its image encoder."""

    places: ClassVar[tuple[str, ...]] = ("id", "weight_name", "image_encoder", "revision")

    id: str
    """Hub id or folder, e.g. `h94/IP-Adapter`."""
    subfolder: str = ""
    """Folder of the adapter's weights inside the repository or folder `id`, e.g. `sdxl_models`."""
    weight_name: str
    """File of the adapter's weights, e.g. `ip-adapter_sdxl_vit-h.safetensors`. Redux is recognised by its weights: id
    `black-forest-labs/FLUX.1-Redux-dev`, subfolder `image_embedder`, file `diffusion_pytorch_model.safetensors`."""
    image_encoder_folder: str = "image_encoder"
    """Folder of the image encoder inside the repository or folder `id`, e.g. `models/image_encoder`."""
    image_encoder: str | None = Later(None)
    """Hub id or folder of the image encoder, e.g. `openai/clip-vit-large-patch14`. null: the encoder is in
    `image_encoder_folder`."""
    revision: str | None = None
    """Commit or tag at the hub."""

    def encoder_place(self) -> tuple[str, str, str | None]:
        """Hub id or folder of the image encoder, its folder inside, and its commit or tag."""
        if self.image_encoder is not None:
            return self.image_encoder, "", None
        return self.id, self.image_encoder_folder, self.revision


class FewStepConfig(Part):
    """Weights that were distilled to few steps. The high_res stage uses them instead of the base model's denoiser."""

    places: ClassVar[tuple[str, ...]] = ("id", "weight_name", "revision")

    id: str
    """Hub id or folder, e.g. `ByteDance/SDXL-Lightning`. `picturebook`: the embedded pack's LoRA, which needs no other
    key here."""
    subfolder: str = ""
    """Folder of the weights inside the repository or folder `id`, e.g. `unet`."""
    weight_name: str | None = None
    """File of the weights, e.g. `sdxl_lightning_8step_lora.safetensors`: a LoRA, or a whole UNet (not a single file of
    a whole pipeline). null: `subfolder` is the folder of a whole UNet in diffusers format, as in SDXL-Turbo."""
    revision: str | None = None
    """Commit or tag at the hub."""
    kind: Literal["auto", "lightning", "hyper", "lcm", "dmd2", "turbo"] = "auto"
    """How the weights were distilled, which fixes their timesteps, guidance and stepper (docs/bases.md). `auto`: as
    `id` and `weight_name` say."""
    steps: int | None = Field(default=None, ge=1, le=50)
    """The number of steps that the weights were distilled to. null: as `weight_name` says, and 4 if it says nothing."""


class ControlNetConfig(Part):
    """The source of a ControlNet for `upscale.control`."""

    places: ClassVar[tuple[str, ...]] = ("id", "revision", "variant")

    id: str
    """Hub id or folder, e.g. `xinsir/controlnet-tile-sdxl-1.0`. `picturebook`: the embedded pack's tile ControlNet,
    which needs no other key here."""
    subfolder: str = ""
    """Folder of the net inside the repository or folder `id`."""
    revision: str | None = None
    """Commit or tag at the hub."""
    variant: str | None = None
    """Weight variant, e.g. `fp16`."""

    @property
    def folder(self) -> str:
        """`subfolder`, or the folder of the embedded pack's net."""
        return self.subfolder or ("control_net" if self.id == "picturebook" else "")


class ModelConfig(Part):
    """Which weights are loaded, from where, and onto which device."""

    places: ClassVar[tuple[str, ...]] = ("id", "revision", "variant", "vae")

    id: str = "picturebook"
    """`picturebook` (the embedded pack), a hub id such as `stabilityai/stable-diffusion-xl-base-1.0`, or a folder.
    `picturebook-as-flow` is the pack's UNet on a flow-matching path: the same images, to try that path."""
    revision: str | None = None
    """Commit or tag at the hub. It should be given, because it is part of the dataset's identity."""
    variant: str | None = None
    """Weight variant, e.g. `fp16`."""
    vae: str | None = None
    """Hub id or folder of another VAE, e.g. `madebyollin/sdxl-vae-fp16-fix`."""
    ip_adapter: IpAdapterConfig | None = None
    """The adapter for image prompts: an IP-Adapter, or Redux for FLUX.1. The picturebook pack has its own adapter and
    needs no entry here."""
    few_step: FewStepConfig | None = Later(None)
    """Weights that draw in few steps, for the high_res stage alone: SDXL-Lightning, Hyper-SD, LCM, DMD2 or SDXL-Turbo.
    Low-res images are made by the base model all the same."""
    controlnet: ControlNetConfig | None = Operational(None)
    """The ControlNet that `upscale.control` uses, for SDXL and Stable Diffusion. Only high-res images depend on it, and
    only if `upscale.control` is on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: on CUDA float16 for UNets and bfloat16 for transformers, float32 elsewhere. With `bfloat16` the VAE stays
    in float32."""
    native_px: int | None = Later(None, ge=16, le=65_536)
    """Edge of the square images that the model was trained on, and of its views. null: as the model's files say."""
    guidance: Literal["auto", "cfg", "none"] = Later("auto")
    """What the guidance scale of a flow-matching model does. `cfg`: it takes an unconditional branch (checkpoints of
    FLUX.1 whose distilled guidance was trained away). `none`: nothing (models distilled to few steps). `auto`: what the
    model's files and name say."""
    device: str = Operational("auto")
    """`auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    offload: Literal["auto", "none", "text", "model"] = Operational("auto")
    """`model`: only the model part at work is on the GPU. This is slower and needs less GPU memory. `text`: the text
    encoders are on the GPU only while they work. `auto`: `text` for models with large text encoders, else `none`."""
    compile: Literal["auto", "blocks", "off"] = Operational("auto")
    """`blocks`: the denoiser's transformer blocks are compiled at first use, once for each shape (about a minute).
    Blocks that a method changes run uncompiled. `auto`: `blocks` on CUDA, `off` elsewhere."""
    exactness: Literal["bytes", "fast"] = Operational("bytes")
    """`bytes`: a re-run on the same kind of machine gives the same bytes. `fast`: cuDNN chooses convolutions by timing
    them, so bytes may differ by rounding. Commit records hold this value."""
    quantise: Literal["none", "fp8"] = Later("none")
    """`fp8`: the denoiser's large linear layers compute in 8 bits and are compiled. Needs CUDA with compute capability
    8.9 or higher, and the extra `fp8`."""

    @property
    def base(self) -> ModelConfig:
        """The base model alone, without few-step weights."""
        return self if self.few_step is None else self.model_copy(update={"few_step": None})
