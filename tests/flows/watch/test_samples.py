"""What a run's page shows of its samples while they are made."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image

from resmaster_flows.watch.samples import (
    CELL_PX,
    FAILED_ROWS,
    FIRST_OF_SHARD,
    FIRST_ROWS,
    GAP_PX,
    IMAGE_CHARACTERS,
    TEXT_CHARACTERS,
    WAITING,
    Samples,
)
from resmaster_stages.progress import Glance, SampleDone
from tests.fake_stages import png


def done(
    stage: str, shard: int, key: str, images: Mapping[str, bytes], error: str = "", prompt: str = ""
) -> SampleDone:
    return SampleDone(stage, shard, not error, key, error, lambda: Glance(prompt or f"prompt of {key}", images))


def images_of(page: str) -> list[Image.Image]:
    found = re.findall(r"\(data:image/webp;base64,([^)]+)\)", page)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB") for each in found]


RED, BLUE = png((200, 0, 0), (64, 64)), png((0, 0, 200), (512, 512))


def test_a_sample_is_seen_when_it_is_drawn_and_again_when_it_is_enlarged() -> None:
    samples = Samples()
    assert samples.page() == ""
    samples.hear(done("low_res", 7, "k1", {"low_res": RED}))
    (image,) = images_of(samples.page())
    assert image.size == (CELL_PX, CELL_PX)
    samples.hear(done("captions", 7, "k1", {"low_res": RED}))
    samples.hear(done("high_res", 7, "k1", {"low_res": RED, "high_res": BLUE}))
    page = samples.page()
    (pair,) = images_of(page)
    assert pair.size == (CELL_PX + GAP_PX + CELL_PX, CELL_PX)
    left, right = pair.getpixel((CELL_PX - 8, 80)), pair.getpixel((CELL_PX + GAP_PX + 8, 80))
    assert np.argmax(left) == 0
    assert np.argmax(right) == 2
    assert page.startswith(f"## The first {FIRST_OF_SHARD} samples of each shard\n\n![low-res beside high-res](data:")
    assert page.endswith(")<br>shard 000007, `k1`: prompt of k1")
    assert samples.page() == page, "an unchanged page is not sent again"


def test_images_are_read_of_the_first_samples_of_each_shard_alone() -> None:
    read: list[tuple[int, str]] = []

    def event(stage: str, shard: int, key: str) -> SampleDone:
        def glance() -> Glance:
            read.append((shard, key))
            return Glance("a", {stage: RED})

        return SampleDone(stage, shard, True, key, "", glance)

    samples = Samples()
    for shard in (0, 1):
        for stage in ("low_res", "captions", "high_res", "quality"):
            for number in range(50):
                samples.hear(event(stage, shard, f"{shard}-{number}"))
            samples.page()
    assert read == [(shard, f"{shard}-{n}") for shard in (0, 1) for _ in ("low_res", "high_res") for n in (0, 1)]
    assert re.findall(r"`(\d-\d+)`", samples.page()) == ["1-1", "1-0", "0-1", "0-0"], "the newest comes first"


def test_a_failed_sample_shows_its_image_and_why() -> None:
    samples = Samples()
    samples.hear(done("low_res", 0, "k1", {"low_res": RED}))
    samples.hear(done("high_res", 0, "k1", {"low_res": RED}, "NaN in the *latents*"))
    samples.hear(done("low_res", 0, "k2", {}, "no image in it"))
    page = samples.page()
    assert page.startswith(
        "## 2 failed samples\n\nshard 000000, `k2`: prompt of k2<br>**low\\_res: no image in it**\n\n"
    )
    assert page.endswith(")<br>shard 000000, `k1`: prompt of k1<br>**high\\_res: NaN in the \\*latents\\***")
    assert len(images_of(page)) == 1
    assert "first" not in page, "a sample has one row"


def test_an_image_that_cannot_be_decoded_is_no_failure() -> None:
    samples = Samples()
    samples.hear(done("low_res", 0, "k1", {"low_res": b"nonsense"}))
    assert samples.page().endswith("\n\nshard 000000, `k1`: prompt of k1")


def test_the_page_is_small_whatever_comes() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    samples, loud = Samples(), {"low_res": buffer.getvalue(), "high_res": buffer.getvalue()}
    for shard in range(200):
        for number in range(3):
            samples.hear(done("high_res", shard, f"{shard}-{number}", loud, prompt="word <b>" * 5000))
            samples.hear(done("high_res", shard, f"{shard}-{number}-bad", loud, "no " * 500, prompt="w " * 5000))
        samples.page()
    page = samples.page()
    assert len(images_of(page)) == FIRST_ROWS + FAILED_ROWS
    assert "## 600 failed samples" in page
    assert "<b>" not in page
    assert len(page) < (FIRST_ROWS + FAILED_ROWS) * (IMAGE_CHARACTERS + 4 * TEXT_CHARACTERS)


def test_few_files_are_held_while_nobody_looks() -> None:
    samples = Samples()
    for shard in range(100):
        samples.hear(done("low_res", shard, f"{shard}", {"low_res": RED}))
    assert len(images_of(samples.page())) == WAITING
