"""Makes a denoiser faster as a whole: compiles its transformer blocks and computes large linear layers in 8 bits.

Invariants:
- Compiled blocks give the same results up to rounding. A machine that cannot compile runs the blocks uncompiled and
  says so in one line.
- While a method has changed a layer of a block, the block runs uncompiled, because the change would break its graph.
- `quantise_fp8` changes results, so users must ask for it by name, and it never falls back.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resmaster_stages.errors import ConfigError, first_line
from resmaster_stages.models.bases.base import network_of
from resmaster_stages.progress import Note, emit

_GRAPHS = 64
"""The most graphs that one block's code may have: levels of the UNet times shapes of batches (guided or not, moved
views or not)."""

FP8_LEAST_WIDTH = 640
"""Least width of a layer in 8 bits. Narrower layers are bound by memory, not by arithmetic."""

_NOT_IN_FP8 = (
    "time_embedding",
    "add_embedding",
    "time_emb_proj",
    "attn2.to_k",
    "attn2.to_v",
    "encoder_hid_proj",
    "_ip.",
    "embed",
    "norm",
    "modulation",
)
"""Parts of the names of layers that stay as they are: embeddings, modulations, text and image projections. They cost
nothing, and their errors reach every pixel. The same is true of layers outside of all blocks."""


def can_compile(device: torch.device) -> bool:
    """Whether code for `device` can be compiled on this machine. It is found out by compiling one line."""
    probe = torch.compile(lambda x: (x * 2 + 1).relu(), dynamic=False)
    try:
        return bool((probe(torch.ones(8, device=device)) == 3).all())
    except Exception as error:  # a compiler, a linker or a driver can raise anything
        emit(
            Note(
                f"model.compile: nothing can be compiled for {device} here ({first_line(error)}); "
                "the model runs uncompiled, more slowly. "
                "Install a C compiler (and on CUDA Triton), or set model.compile: off"
            )
        )
        return False


def has_blocks(denoiser: Any) -> bool:
    """Whether `denoiser` can be compiled block by block, as diffusers' models can."""
    return hasattr(network_of(denoiser), "compile_repeated_blocks")


def compile_blocks(unet: Any) -> None:
    """Compiles the repeated blocks of `unet` permanently, each static shape at its first use.

    Raises ConfigError if `unet` has no repeated blocks.
    """
    if not has_blocks(unet):
        raise ConfigError(f"model.compile: blocks: a {type(unet).__name__} has none; set model.compile: off")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _GRAPHS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * _GRAPHS)
    network_of(unet).compile_repeated_blocks(fullgraph=True, dynamic=False)


def compiled_blocks(unet: Any) -> list[nn.Module]:
    """The compiled blocks of `unet`. Empty if `unet` is not a torch module."""
    network = network_of(unet)
    modules = network.modules() if isinstance(network, nn.Module) else ()
    return [module for module in modules if getattr(module, "_compiled_call_impl", None) is not None]


def _is_changed(block: nn.Module) -> bool:
    return any("forward" in module.__dict__ for module in block.modules())


@contextmanager
def changed_blocks_uncompiled(unet: Any) -> Iterator[None]:
    """Within the block, compiled blocks with a replaced layer (`patches.replaced_forward`) run uncompiled."""
    changed = [(block, block._compiled_call_impl) for block in compiled_blocks(unet) if _is_changed(block)]
    if changed:
        emit(Note(f"{len(changed)} of the model's blocks run uncompiled: the method changes layers of theirs"))
    try:
        for block, _ in changed:
            block._compiled_call_impl = None
        yield
    finally:
        for block, compiled in changed:
            block._compiled_call_impl = compiled


def takes_fp8(module: nn.Module, name: str, least_width: int = FP8_LEAST_WIDTH) -> bool:
    """Whether a layer of a denoiser shall compute in 8 bits: a wide linear layer of its blocks with widths divisible by
    16."""
    if not isinstance(module, nn.Linear) or "." not in name or any(part in name for part in _NOT_IN_FP8):
        return False
    widths = (module.in_features, module.out_features)
    return min(widths) >= least_width and not any(width % 16 for width in widths)


def require_fp8(device: torch.device, compiled: bool) -> None:
    """Raises ConfigError unless 8-bit linear layers can run on `device` and are faster there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"model.quantise: fp8 needs a CUDA device of compute capability 8.9 (Ada, Hopper) or later, and {device} "
            "is none; set model.quantise: none"
        )
    if not compiled:
        raise ConfigError(
            "model.quantise: fp8 is slower than float16 unless it is compiled; set model.compile: blocks, or "
            "model.quantise: none"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "model.quantise: fp8 needs torchao; install resmaster-pipeline[fp8], or set model.quantise: none"
        )


def quantise_fp8(unet: Any, least_width: int = FP8_LEAST_WIDTH) -> int:
    """Makes the wide linear layers of `unet` compute in 8 bits, with scales per row, permanently.

    Returns the number of these layers.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chosen = {name for name, module in network_of(unet).named_modules() if takes_fp8(module, name, least_width)}
    rule = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(network_of(unet), rule, filter_fn=lambda _, name: name in chosen)
    return len(chosen)
