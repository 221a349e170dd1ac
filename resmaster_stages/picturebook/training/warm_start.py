"""Start training from an earlier pack: its weights, with the token embeddings carried over word by word.

For a world that grew (new kinds, colours or words): what the earlier pack knows need not be learnt again. Words that
the earlier tokenizer lacks keep their fresh embeddings. Copy the pack aside before its code changes: the tokenizer is
read from it. Knows nothing about training.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, GitForCausalLM

from resmaster_stages.picturebook.training.tokens import make_tokenizer


def carry_words(old: Tensor, fresh: Tensor, pack: Path) -> Tensor:
    """`fresh` rows [V, ...] of this world's tokenizer with the rows of `old` [V', ...] for every token both have."""
    before = CLIPTokenizer.from_pretrained(pack / "tokenizer").get_vocab()
    rows = fresh.clone()
    for token, index in make_tokenizer().get_vocab().items():
        if token in before:
            rows[index] = old[before[token]].to(rows.dtype)
    return rows


def carry(model: nn.Module, weights: dict[str, Tensor], pack: Path, words: tuple[str, ...] = ()) -> None:
    """Load `weights` into `model`; entries named in `words` have one row a token. Raises for any other difference."""
    own = model.state_dict()
    loaded = {k: carry_words(v, own[k], pack) if k in words else v.to(own[k].dtype) for k, v in weights.items()}
    model.load_state_dict(loaded)


def vae(model: AutoencoderKL, pack: Path) -> None:
    """The pack's VAE. Where `model` has more latent channels, the pack's are its first; the others start fresh, and
    small in the decoder, so that what the pack can draw is drawn from the first step on."""
    weights = AutoencoderKL.from_pretrained(pack, subfolder="vae").state_dict()
    own = model.state_dict()
    before, now = weights["post_quant_conv.bias"].numel(), own["post_quant_conv.bias"].numel()
    if now > before:
        weights = {k: _with_channels(v, own[k], k, before) for k, v in weights.items()}
    carry(model, weights, pack)


QUIET, NEW_LOG_VARIANCE = 0.5, -6.0
"""Of new latent channels: how much of a fresh layer's reading of them the decoder keeps, and the log of their noise."""


def _with_channels(old: Tensor, fresh: Tensor, name: str, before: int) -> Tensor:
    """A layer beside the latents, `old` for `before` channels, in the shape of `fresh`."""
    if old.shape == fresh.shape:
        return old
    now = fresh.shape[0] // 2 if name.startswith(("encoder.", "quant_conv.")) else fresh.shape[0]
    out = fresh.clone()
    if name == "decoder.conv_in.weight":
        out *= QUIET
        out[:, :before] = old
    elif name.startswith("post_quant_conv."):
        out.zero_()
        if old.ndim > 1:
            out[range(before, now), range(before, now)] = 1.0
            out[:before, :before] = old
        else:
            out[:before] = old
    elif name.startswith("encoder.conv_out."):
        out[:before], out[now : now + before] = old[:before], old[before:]
    elif name == "quant_conv.bias":
        out.zero_()
        out[now:] = NEW_LOG_VARIANCE
        out[:before], out[now : now + before] = old[:before], old[before:]
    else:  # quant_conv.weight: means and log variances, of means and log variances
        out.zero_()
        out[range(before, now), range(before, now)] = 1.0
        for rows, from_rows in ((0, 0), (now, before)):
            for cols, from_cols in ((0, 0), (now, before)):
                part = old[from_rows : from_rows + before, from_cols : from_cols + before]
                out[rows : rows + before, cols : cols + before] = part
    return out


def clip(text: nn.Module, image: nn.Module, pack: Path) -> float:
    """The pack's text encoder 2 and image encoder, and its log scale."""
    whole = CLIPModel.from_pretrained(pack / "clip")
    weights = whole.state_dict()
    for model, prefixes in (
        (text, ("text_model.", "text_projection.")),
        (image, ("vision_model.", "visual_projection.")),
    ):
        part = {k: v for k, v in weights.items() if k.startswith(prefixes)}
        words = tuple(k for k in part if k.endswith("token_embedding.weight"))
        carry(model, part, pack, words)
    return float(whole.logit_scale.detach())


def captioner(model: nn.Module, pack: Path) -> None:
    """The pack's captioner, without its image encoder where `model` has none."""
    own = model.state_dict()
    weights = {k: v for k, v in GitForCausalLM.from_pretrained(pack / "captioner").state_dict().items() if k in own}
    words = tuple(k for k, v in weights.items() if v.shape != own[k].shape)
    carry(model, weights, pack, words)


def painter(unet: UNet2DConditionModel, text: nn.Module, pack: Path) -> None:
    """The pack's UNet and IP-Adapter into a UNet with adapter processors, and its text encoder 1."""
    weights = UNet2DConditionModel.from_pretrained(pack, subfolder="unet").state_dict()
    names = list(unet.attn_processors)
    for key, value in load_file(pack / "ip_adapter" / "ip-adapter.safetensors").items():
        if key.startswith("image_proj."):
            rest = key.removeprefix("image_proj.").replace("proj.", "image_embeds.")
            weights["encoder_hid_proj.image_projection_layers.0." + rest] = value
        else:
            _, number, which = key.split(".", 2)
            weights[f"{names[int(number)]}.{which.removesuffix('.weight')}.0.weight"] = value
    carry(unet, weights, pack)
    encoder = CLIPTextModel.from_pretrained(pack, subfolder="text_encoder").state_dict()
    carry(text, encoder, pack, tuple(k for k in encoder if k.endswith("token_embedding.weight")))


START = "started-from.json"
"""In the work folder: data and stages of the pack that the training started from."""


def begin(pack: Path, work: Path) -> None:
    """Note in `work` what `pack` is, for the next card. Raises SystemExit, in one line, where it is no pack."""
    if not (pack / "card.json").is_file():
        raise SystemExit(
            f"--from-pack {pack}: no picturebook pack (card.json is missing); give the folder of an earlier pack."
        )
    card = json.loads((pack / "card.json").read_text())
    earlier = {name: card.get(name) for name in ("data", "stages", "hardware", "started_from")}
    (work / START).write_text(json.dumps(earlier, indent=2) + "\n")
