"""Moves large models to and from a device, so that the base model and the captioner are never there together.

Invariants:
- Modules that are not needed move to the CPU before the needed modules move to the device. They wait in the CPU's
  memory, so nothing is loaded again.
- If not all needed modules fit on the device, none of them stays there.
- On CPUs nothing moves.
- Modules are referenced weakly, so this module keeps no model alive.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch

_there: dict[tuple[str, int], WeakSet[Any]] = {}
"""Device -> the modules that were moved to it."""


def has_own_memory(device: torch.device) -> bool:
    """Whether models on `device` use memory other than the CPU's."""
    return device.type != "cpu"


def occupy(device: torch.device, *modules: Any) -> None:
    """Moves `modules` to `device`. All other modules that this function moved there go to the CPU first.

    If moving fails, e.g. because memory runs out, none of `modules` stays on the device and the error is raised again.
    """
    if not has_own_memory(device):
        return
    there = _there.setdefault((device.type, device.index or 0), WeakSet())
    # Outside inference mode, because blocks would be compiled anew for tensors that are made within inference mode.
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
