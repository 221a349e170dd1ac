"""Ground truth for prompts in picturebook's language: a scene that shows what the prompt says, drawn at any size.

Vectors have detail at every resolution, so these images are samples of what a perfect upscaler would give. A seed
chooses the layout of a scene, so it is not the layout of any generated image. Compare sets of images, not single
images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from PIL import Image

from resmaster_stages.errors import ConfigError
from resmaster_stages.keys import digest
from resmaster_stages.picturebook import captions, scenes

MOST_OBJECTS = 3


def true_scene(prompt: str, width: float, replica: int = 0) -> scenes.Scene:
    """A scene of 512 x `width` units with the prompt's objects, ground and sky.

    Everything that the prompt does not say follows from the prompt and `replica`. Raises ConfigError for prompts that
    name nothing of this world, or more objects than its scenes hold.
    """
    wanted = captions.ordered_pairs(prompt)
    ground, sky = captions.place(prompt)
    if not wanted and ground is None and sky is None:
        raise ConfigError(
            f"picturebook's drawings: the prompt {prompt[:60]!r} names nothing of its world; use prompts such as "
            "'a red house on a green meadow under a blue sky', or give a folder of images"
        )
    if len(wanted) > MOST_OBJECTS:
        raise ConfigError(
            f"picturebook's drawings: the prompt {prompt[:60]!r} names {len(wanted)} objects; its scenes hold "
            f"{MOST_OBJECTS}"
        )
    seed = int(digest([prompt, replica])[:12], 16)
    return scenes.scene_of(seed, width, ground, sky, wanted)


def check(prompts: Iterable[str], height_px: int, width_px: int) -> None:
    """Raise ConfigError, before anything is drawn, for prompts or sizes that `true_image` cannot draw."""
    if importlib.util.find_spec("resvg_py") is None:
        raise ConfigError("picturebook's drawings: needs resvg_py; install it: pip install 'resmaster-pipeline[train]'")
    if not height_px <= width_px <= 2 * height_px:
        raise ConfigError(
            f"picturebook's drawings: {height_px} x {width_px} px; its scenes are square to twice as wide as high; "
            "choose other scales, or give a folder of images"
        )
    for prompt in prompts:
        true_scene(prompt, scenes.HEIGHT)


def true_image(prompt: str, height_px: int, width_px: int, replica: int = 0) -> Image.Image:
    """The scene of a prompt as an RGB image, at least as wide as high and at most twice as wide.

    Raises ConfigError like `check`.
    """
    from resmaster_stages.picturebook.render import render

    check([prompt], height_px, width_px)
    scene = true_scene(prompt, scenes.HEIGHT * width_px / height_px, replica)
    return render(scene, height_px, width_px)
