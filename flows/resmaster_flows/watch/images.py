"""Shows how far the upscaling of images is: by bars on a terminal, else by a line per image and per tenth of its
steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar

from resmaster_flows.watch.terminal import say
from resmaster_stages.redaction import printable

Step = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""


@contextmanager
def upscaling(console: Console, images: int) -> Iterator[Callable[[str, str], Step]]:
    """Within the block, show how far `images` images are. Yields a function that is called when an image begins, with
    the image's name and what is done before its first step. It returns what is called after each step."""
    begun = 0
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        whole = bar.add_task("images", total=images, visible=images > 1)
        part = bar.add_task("starting", total=None)

        def begin(name: str, first: str) -> Step:
            nonlocal begun
            begun += 1
            place = f"image {begun} of {images}: " if images > 1 else ""
            bar.update(whole, completed=begun - 1, description=f"image {begun} of {images}")
            bar.reset(part, total=None, description=escape(printable(first)))
            if not console.is_terminal:
                say(console, f"  {place}{name}, {first}" if images > 1 else f"  {first}")

            def step(done: int, total: int) -> None:
                bar.update(part, description="upscaling", completed=done, total=total)
                if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                    say(console, f"  {place}upscaling: step {done} of {total}")

            return step

        yield begin
