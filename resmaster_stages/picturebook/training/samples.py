"""The image in the documentation: what the pack paints for the demo prompts, and one real scene at 128 and 512 px.

`python -m resmaster_stages.picturebook.training.samples out.png [--work train]` (with --work: the checkpoints instead
of the pack).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw

from resmaster_stages.picturebook import scenes
from resmaster_stages.picturebook.render import render
from resmaster_stages.picturebook.training.evaluate import paint
from resmaster_stages.picturebook.training.export import PACK, assemble

PROMPTS = Path(__file__).parents[1] / "prompts.txt"
EXAMPLE_SEED = 30
_LINE_PX, _PAPER, _INK = 13, "#fbf9f4", "#2b2b2b"


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def prompt_grid(images: list[Image.Image], prompts: list[str], columns: int = 8, scale: int = 1) -> Image.Image:
    """Images in a grid, each above its prompt."""
    w, h = images[0].width * scale, images[0].height * scale
    text_px = 5 * _LINE_PX + 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (w + 6) + 6, rows * (h + text_px) + 6), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        x, y = 6 + (i % columns) * (w + 6), 6 + (i // columns) * (h + text_px)
        sheet.paste(image.resize((w, h), Image.Resampling.BICUBIC), (x, y))
        for k, line in enumerate(_wrap(prompt, w // 6)[:5]):
            pen.text((x, y + h + 2 + k * _LINE_PX), line, fill=_INK)
    return sheet


def sheet(pipe: StableDiffusionXLPipeline, seed: int = 0, guidance: float = 5.0) -> Image.Image:
    """The documentation's image."""
    prompts = PROMPTS.read_text().split("\n")[:16]
    grid = prompt_grid(paint(pipe, prompts, seed=seed, guidance=guidance), prompts)
    scene = scenes.make_scene(EXAMPLE_SEED)
    box = (0.0, 0.0, scenes.HEIGHT, scenes.HEIGHT)
    small = render(scene, 128, 128, box).resize((512, 512), Image.Resampling.BICUBIC)
    out = Image.new("RGB", (grid.width, grid.height + 540), _PAPER)
    out.paste(grid, (0, 0))
    out.paste(small, (12, grid.height))
    out.paste(render(scene, 512, 512, box), (536, grid.height))
    pen = ImageDraw.Draw(out)
    pen.text((12, grid.height + 516), "a real scene drawn at 128 px and enlarged", fill=_INK)
    pen.text((536, grid.height + 516), "the same scene drawn at 512 px", fill=_INK)
    return out


def main() -> None:
    """Write the image."""
    parser = argparse.ArgumentParser(
        prog="python -m resmaster_stages.picturebook.training.samples", description=__doc__
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=5.0)
    args = parser.parse_args()
    if args.work:
        pipe, _ = assemble(args.work)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(PACK, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pipe, args.seed, args.guidance).save(args.out)


if __name__ == "__main__":
    main()
