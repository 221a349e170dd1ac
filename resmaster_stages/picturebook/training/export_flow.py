"""Write picturebook-flow as a normal diffusers folder, fp16, plus its IP-Adapter: `python -m
resmaster_stages.picturebook.training.export_flow --work train_flow --to pack_flow`.

Any checkpoint will do, also of a training that goes on. `FluxPipeline.from_pretrained(folder)` loads it offline; pass
`max_sequence_length=77`, for that many tokens it was trained on. VAE, image encoder and pooled text are the pack's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from resmaster_stages.picturebook.training import data, train_flow
from resmaster_stages.picturebook.training.export import PACK, image_processor
from resmaster_stages.picturebook.training.samples import PROMPTS, prompt_grid
from resmaster_stages.picturebook.training.tokens import make_tokenizer

_PROJECTION = "encoder_hid_proj.image_projection_layers.0."


def split_adapter(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a transformer's state dict into the plain transformer's and the IP-Adapter's in the published key format:
    double block i has the number i."""
    plain, adapter = {}, {}
    for key, value in weights.items():
        if key.startswith(_PROJECTION):
            adapter["image_proj." + key.removeprefix(_PROJECTION).replace("image_embeds.", "proj.")] = value
        elif ".processor.to_" in key:
            block, _, rest = key.partition(".attn.processor.to_")
            number, part = block.removeprefix("transformer_blocks."), rest.rpartition(".")[2]
            adapter[f"ip_adapter.{number}.to_{rest[0]}_ip.{part}"] = value
        else:
            plain[key] = value
    return plain, adapter


def assemble(work: Path, pack: Path = PACK, averaged: bool = True) -> tuple[FluxPipeline, dict[str, Tensor]]:
    """The pipeline (float32) and the IP-Adapter's state dict from the checkpoint in `work` and the pack's parts."""
    painter = train_flow.load(work, averaged)
    plain, adapter = split_adapter(painter.transformer.state_dict())
    transformer = FluxTransformer2DModel(**train_flow.CONFIG)
    transformer.load_state_dict(plain)
    taken = AutoencoderKL.from_pretrained(pack, subfolder="vae", local_files_only=True).float()
    kept = {k: v for k, v in taken.config.items() if not k.startswith("_")}
    vae = AutoencoderKL(**{**kept, "shift_factor": 0.0, "sample_size": data.NATIVE_PX})
    vae.load_state_dict(taken.state_dict())
    image = CLIPVisionModelWithProjection.from_pretrained(pack, subfolder="image_encoder", local_files_only=True)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=train_flow.SHIFT, use_dynamic_shifting=False),
        vae=vae.eval(),
        text_encoder=train_flow.pooled_tower(work),
        tokenizer=make_tokenizer(),
        text_encoder_2=painter.text,
        tokenizer_2=make_tokenizer(),
        transformer=transformer.eval(),
        image_encoder=image.float().eval(),
        feature_extractor=image_processor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, adapter


def export(work: Path, target: Path, pack: Path = PACK) -> int:
    """Write the folder from the checkpoint in `work`, in place of an earlier one. Returns its size in bytes."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe, adapter = assemble(work, pack)
    pipe.to(torch.float16)
    pipe.save_pretrained(partial)
    (partial / "ip_adapter").mkdir()
    half = {k: v.half().contiguous() for k, v in adapter.items()}
    save_file(half, partial / "ip_adapter" / "ip-adapter.safetensors")
    state = torch.load(work / "flow.pt", map_location="cpu", weights_only=True, mmap=True)
    card = {
        "base": "picturebook-flow",
        "taught_by": "picturebook",
        "max_sequence_length": make_tokenizer().model_max_length,
        "stages": {"flow": {"steps": state["step"], "seconds": round(state["elapsed"])}},
    }
    (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    files = [p for p in partial.rglob("*") if p.is_file()]
    for path in files:
        path.chmod(0o644)
    total = sum(p.stat().st_size for p in files)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"export: {total / 1e6:.1f} MB in {target}", flush=True)
    return total


def main() -> None:
    """Write the folder, and what it paints for the demo's prompts beside it."""
    from resmaster_stages.picturebook.training.evaluate import paint

    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.export_flow", description=__doc__
    )
    parser.add_argument("--work", type=Path, default=Path("train_flow"))
    parser.add_argument("--to", type=Path, default=Path("pack_flow"))
    parser.add_argument("--pack", type=Path, default=PACK)
    parser.add_argument("--guidance", type=float, default=2.0, help="true guidance beside what is folded in; 1 is none")
    args = parser.parse_args()
    export(args.work, args.to, args.pack)
    pipe = FluxPipeline.from_pretrained(args.to, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = PROMPTS.read_text().split("\n")[:16]
    sheet = prompt_grid(paint(pipe, prompts, guidance=args.guidance), prompts)
    sheet.save(args.to.with_suffix(".png"))


if __name__ == "__main__":
    main()
