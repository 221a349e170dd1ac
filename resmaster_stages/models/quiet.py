"""Keeps the libraries that load and call models from printing what only this project could act on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def quiet(of_diffusers: Any = None) -> Iterator[None]:
    """Within the block, transformers prints errors only, and draws no bars of its own.

    Its warnings are about how this project calls it: a package that is not needed, layers that are not sharded. If it
    was told to say more than warnings, it still does. The bars of downloads are the hub client's, and stay.
    of_diffusers: `diffusers.utils.logging`, where diffusers is called too. It takes a second to import.
    """
    from transformers.utils import logging as of_transformers

    with ExitStack() as afterwards:
        afterwards.callback(of_transformers.set_tqdm_hook, of_transformers.set_tqdm_hook(_without_bar))
        if of_diffusers and of_diffusers.is_progress_bar_enabled():
            of_diffusers.disable_progress_bar()
            afterwards.callback(of_diffusers.enable_progress_bar)
        for library in filter(None, (of_transformers, of_diffusers)):
            if library.get_verbosity() == library.WARNING:
                library.set_verbosity_error()
                afterwards.callback(library.set_verbosity_warning)
        yield


def _without_bar(bar: Callable[..., Any], words: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A bar of transformers that is not drawn."""
    return bar(*words, **{**options, "disable": True})
