"""Which large models are on a device: the base model or the captioner, never both.

Knows no model. Invariants:
- Who is needed comes, and who is there goes to the CPU first. Nothing is loaded again: it waits in the CPU's memory.
- Who could not come wholly is not there in part.
- On CPUs nothing moves.
- What is kept nowhere else is not kept here.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch

_there: dict[tuple[str, int], WeakSet[Any]] = {}
"""Device -> the modules that came to it."""


def has_own_memory(device: torch.device) -> bool:
    """Whether models on `device` take memory that the CPU's do not."""
    return device.type != "cpu"


def occupy(device: torch.device, *modules: Any) -> None:
    """Brings `modules` to `device`; all others that came by this function go to the CPU.

    Raises what moving raises, e.g. where memory runs out: none of `modules` is there then.
    """
    if not has_own_memory(device):
        return
    there = _there.setdefault((device.type, device.index or 0), WeakSet())
    # Outside inference mode: tensors that are made within are of another kind, for which blocks would be compiled anew.
    with torch.inference_mode(False):
        _leave(there, [module for module in there if module not in modules])
        try:
            for module in modules:
                if module not in there:
                    there.add(module)
                    module.to(device)
        except BaseException:
            _leave(there, list(modules))
            raise


def _leave(there: WeakSet[Any], modules: list[Any]) -> None:
    for module in modules:
        there.discard(module)
        module.to("cpu")
