"""Write the trained picturebook as a normal diffusers folder, fp16, plus an IP-Adapter, a captioner and a CLIP."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, GitProcessor, ViTImageProcessorPil

from resmaster_stages.picturebook import scenes
from resmaster_stages.picturebook.training import (
    data,
    train_captioner,
    train_classifier,
    train_clip,
    train_decoder,
    train_super_resolution,
    train_unet,
    train_vae,
)
from resmaster_stages.picturebook.training.tokens import make_tokenizer
from resmaster_stages.picturebook.training.warm_start import START

PACK = Path(__file__).parents[1] / "pack"
FILE_LIMIT_BYTES, PACK_LIMIT_BYTES = 15_000_000, 50_000_000


def image_processor() -> CLIPImageProcessorPil:
    """64 px, centre crop, [-1, 1]: what the image tower and the captioner were trained on."""
    side = train_clip.IMAGE_PX
    return CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        resample=3,
    )


def split_adapter(weights: dict[str, Tensor], names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a UNet state dict into the plain UNet's and the IP-Adapter's in the published key format.

    `names` are the keys of `unet.attn_processors` in order; cross-attentions get the odd numbers.
    """
    plain, adapter = {}, {}
    for key, value in weights.items():
        if key.startswith("encoder_hid_proj.image_projection_layers.0."):
            rest = key.removeprefix("encoder_hid_proj.image_projection_layers.0.")
            adapter["image_proj." + rest.replace("image_embeds.", "proj.")] = value
        elif ".processor.to_" in key:
            name, _, rest = key.partition(".to_")
            adapter[f"ip_adapter.{names.index(name)}.to_{rest[0]}_ip.weight"] = value
        else:
            plain[key] = value
    return plain, adapter


def assemble(work: Path, averaged: bool = True) -> tuple[StableDiffusionXLPipeline, dict[str, Tensor]]:
    """The pipeline (float32) and the IP-Adapter's state dict from the checkpoints in `work`."""
    tokenizer = make_tokenizer()
    painter = train_unet.load(work, averaged)
    vae = AutoencoderKL(**train_vae.CONFIG, scaling_factor=round(1 / train_unet.latent_std(work), 4))
    vae.load_state_dict(train_decoder.load(work).state_dict())
    text2, image, _ = train_clip.load(work)
    plain, adapter = split_adapter(painter.unet.state_dict(), list(painter.unet.attn_processors))
    unet = UNet2DConditionModel(**train_unet.CONFIG)
    unet.load_state_dict(plain)
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=painter.text,
        text_encoder_2=text2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(**train_unet.SCHEDULE, timestep_spacing="leading", steps_offset=1),
        image_encoder=image,
        feature_extractor=image_processor(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, adapter


def card_of(work: Path) -> dict[str, Any]:
    """How the checkpoints in `work` came about: data, seeds, steps and training seconds per stage, hardware, and the
    stages of the pack that they started from."""
    stages = {}
    for stage in ("vae", "decoder", "clip", "captioner", "classifier", "super_resolution", "unet"):
        path = work / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if state["step"]:  # others are an earlier pack's
                stages[stage] = {"steps": state["step"], "seconds": round(state["elapsed"])}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    earlier = work / START
    return {
        "data": {
            "photos": 500 * len(list((work / "photos").glob("photos-*.npz"))),
            "world": scenes.VERSION,
            "train_seed": data.TRAIN_SEED,
            "held_out_seed": data.HELD_OUT_SEED,
            "kinds": list(scenes.KINDS),
            "colours": list(scenes.COLOURS),
            "grounds": list(scenes.GROUNDS),
            "skies": list(scenes.SKIES),
        },
        "started_from": json.loads(earlier.read_text()) if earlier.exists() else None,
        "stages": stages,
        "hardware": hardware,
    }


def export(work: Path, pack: Path = PACK) -> int:
    """Assemble the pack from the checkpoints in `work`. Returns its size in bytes."""
    partial = pack.with_name(pack.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe, adapter = assemble(work)
    tokenizer, processor, text2, image = (
        pipe.tokenizer_2,
        pipe.feature_extractor,
        pipe.text_encoder_2,
        pipe.image_encoder,
    )
    pipe.to(torch.float16)
    pipe.save_pretrained(partial, max_shard_size=FILE_LIMIT_BYTES * 9 // 10)  # without its header

    (partial / "ip_adapter").mkdir()
    half = {k: v.half().contiguous() for k, v in adapter.items()}
    save_file(half, partial / "ip_adapter" / "ip-adapter.safetensors")

    captioner = train_captioner.load(work)
    captioner.half().save_pretrained(partial / "captioner")
    GitProcessor(processor, tokenizer).save_pretrained(partial / "captioner")

    text_part, image_part = train_clip.text_config(), train_clip.vision_config()
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_part.to_dict(), vision_config=image_part.to_dict(), projection_dim=train_clip.PROJECTION
        )
    )
    weights = {**text2.state_dict(), **image.state_dict(), "logit_scale": torch.tensor(train_clip.load(work)[2])}
    clip.load_state_dict(weights)
    clip.half().save_pretrained(partial / "clip")
    CLIPProcessor(processor, tokenizer).save_pretrained(partial / "clip")

    train_classifier.load(work).half().save_pretrained(partial / "classifier")
    native = {"height": data.NATIVE_PX, "width": data.NATIVE_PX}
    ViTImageProcessorPil(size=native, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        partial / "classifier"
    )

    train_super_resolution.export(work, partial / train_super_resolution.FOLDER)

    (partial / "card.json").write_text(json.dumps(card_of(work), indent=2) + "\n")
    sizes = {p.relative_to(partial): p.stat().st_size for p in partial.rglob("*") if p.is_file()}
    for name, size in sizes.items():
        if size > FILE_LIMIT_BYTES:
            raise ValueError(
                f"{name} has {size / 1e6:.1f} MB, more than {FILE_LIMIT_BYTES / 1e6:.0f}: use a smaller model."
            )
    for name in sizes:
        (partial / name).chmod(0o644)
    total = sum(sizes.values())
    if total > PACK_LIMIT_BYTES:
        raise ValueError(f"The pack has {total / 1e6:.1f} MB, more than {PACK_LIMIT_BYTES / 1e6:.0f}.")
    backup = pack.with_name(pack.name + ".old")
    shutil.rmtree(backup, ignore_errors=True)
    if pack.exists():
        pack.rename(backup)
    partial.rename(pack)
    shutil.rmtree(backup, ignore_errors=True)
    print(f"export: {total / 1e6:.1f} MB in {pack}", flush=True)
    return total
