"""A tiny Z-Image with random weights, and the chat tokenizer that Qwen-Image's tiny model uses as well."""

from __future__ import annotations

import re
import string
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from tests.tiny_transformers import quiet, vae

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A chat template that acts as Qwen3's does on one message of a user."""


MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = re.findall(
    r"\w+",
    "system user assistant Describe the image by detailing color shape size texture quantity text spatial "
    "relationships of objects and background",
)
"""The words of the templates of Z-Image and Qwen-Image. Each is one token, as in Qwen's own tokenizer."""
VOCABULARY = 128


def chat_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A tokenizer of letters and of the templates' words, with the marks of a chat."""
    vocab = {word: number for number, word in enumerate([*MARKS, "<unk>", *string.ascii_letters, *" ,.:\n"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.add_tokens([form for word in WORDS for form in (f" {word}", word)])
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=MARKS[0],
        unk_token="<unk>",
        extra_special_tokens=list(MARKS[1:]),
        chat_template=template,
        padding_side="right",
    )


def make_z_image(seed: int = 0, shift: float = 3.0, **values: Any) -> Any:
    """A fresh ZImagePipeline. Pad tokens are drawn, because they are zeros in a fresh transformer.

    values: fields of the transformer's configuration.
    """
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }
    transformer = ZImageTransformer2DModel(**{**shape, **values})
    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    text = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    return quiet(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
            vae=vae(),
            text_encoder=Qwen3Model(text),
            tokenizer=chat_tokenizer(),
            transformer=transformer,
        )
    )
