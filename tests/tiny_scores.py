"""Tiny models that give scores, with random or hand-made weights: plumbing, their scores mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLIP_PX, CLIP_SIZE = 16, 8


def classifier(folder: Path, labels: tuple[str, ...] = ("normal", "nsfw"), **settings: Any) -> Path:
    """A random ViT in `folder`, as `Falconsai/nsfw_image_detection` is one."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: at for at, name in enumerate(labels)}}
    torch.manual_seed(0)
    config = ViTConfig(**shape, image_size=16, patch_size=8, **names, **settings)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    """A random CLIP model in `folder`, whose processor crops a square."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**shape, "image_size": CLIP_PX, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_SIZE)).save_pretrained(folder)
    CLIPImageProcessorPil(size=CLIP_PX, crop_size=CLIP_PX).save_pretrained(folder)
    return folder


def head(path: Path, layers: dict[str, Any]) -> Path:
    """A file of layers. layers: name of a tensor -> its values."""
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.tensor(values, dtype=torch.float32) for name, values in layers.items()}, path)
    return path
