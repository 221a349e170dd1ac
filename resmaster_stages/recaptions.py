"""Stage 6, optional: describes each finished image as a whole, once for each style that the configuration asks for.

A style is an instruction to the captioner. The captioner sees the image reduced to a longer side of `longest_px`, and
neither the prompt nor the captions of patches. This module does not access storage.

Invariants:
- There is exactly one Output per sample, in order. An error of one sample becomes its Output's error.
- A row depends only on its own image and style: the captioner is asked about one image at a time.
- Rows are sorted by style. A caption is not shortened. If the captioner says nothing, the caption is None, and `status`
  is `empty`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.errors import SampleError
from resmaster_stages.models.captioner import (
    Captioner,
    LocalCaptioner,
    clean_caption,
    load_captioner,
    require_instructions,
    told_of,
)


def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """Yield one Output per sample, in order. Its rows are rows of the table of recaptions, without the key.

    Raises ConfigError if the captioner cannot be loaded, or takes no instruction and is asked for several styles.
    """
    captioners = load_captioners(config)
    for sample in samples:
        try:
            if sample.high_res is None:
                raise SampleError(f"{sample.key}: no high-res image to caption")
            image = reduced(sample.high_res.open(), config.recaption.longest_px)
            rows = [_row(style, image, captioner) for style, captioner in captioners.items()]
            yield Output(key=sample.key, rows=rows)
        except SampleError as error:
            yield Output(key=sample.key, error=error)


def load_captioners(config: DatasetConfig) -> Mapping[str, Captioner]:
    """Style -> the captioner with the style's instruction, sorted by style. Weights are loaded once for all of them."""
    settings, told = config.recaptioner(), told_of(config.recaption)
    found = {}
    for style, instruction in sorted(config.recaption.styles.items()):
        asked = settings.model_copy(update={"instruction": instruction})
        captioner = load_captioner(asked, config.model.device, told)
        assert captioner is not None  # the configuration refuses styles without a captioner
        if isinstance(captioner, LocalCaptioner):
            require_instructions(captioner.name, config.recaption.styles, captioner.takes_instructions)
        found[style] = captioner
    return found


def reduced(image: Image.Image, longest_px: int) -> Image.Image:
    """`image`, reduced until its longer side has at most `longest_px` px. A smaller image stays as it is."""
    longest = max(image.size)
    if longest <= longest_px:
        return image
    width, height = (max(1, round(side * longest_px / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _row(style: str, image: Image.Image, captioner: Captioner) -> dict[str, Any]:
    answers = captioner.caption([image])
    if len(answers) != 1:
        raise SampleError(f"captioner {captioner.name!r} gave {len(answers)} captions for one image")
    caption = clean_caption(answers[0])
    return {
        "style": style,
        "caption": caption or None,
        "model": captioner.name,
        "revision": captioner.revision,
        "status": "ok" if caption else "empty",
    }
