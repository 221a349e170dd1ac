"""Stand-ins for the stages that need no model: tiny, deterministic, and failing where they are told to."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.sample import Output, Sample
from resmaster_stages.dataset.stages import Process
from resmaster_stages.diffusion.cost import count_call
from resmaster_stages.errors import SampleError
from resmaster_stages.keys import canonical_json, sample_seed
from resmaster_stages.models.bases.unet import SDXL
from resmaster_stages.prompts import ingest

BAD = "bad"
"""A prompt with this word fails in the stage it names, e.g. `bad low_res`."""


UNREAD = replace(SDXL, checks=lambda config, demand: ())
"""A family of base models whose files are not there, and are not looked for."""


def config_at(root: str | Path, **values: Any) -> DatasetConfig:
    base = {"name": "demo", "root": str(root), "low_res": {"height": 16, "width": 16}, "samples_per_shard": 2}
    return parse_config({**base, **values})


def planned(root: str | Path, prompts: list[str], folder: Path, **values: Any) -> Dataset:
    """A dataset at `root` with a plan of `prompts`, whose file lies in `folder`."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n")
    config = config_at(root, prompts=str(path), **values)
    dataset = ingest(config)
    return dataset


def png(color: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def files_of(sample: Sample, size: int) -> dict[str, bytes]:
    """An image of the key's colour, or of the colour of the sample's seed if the sample is made again; a large image
    shows the seed of the small one, too."""
    color = tuple(bytes.fromhex(sample.key)[:3])
    facts: dict[str, Any] = {"key": sample.key, "size": size}
    if sample.take:
        seed = sample_seed(sample.key, 0, str(size), sample.take)
        color = (seed % 256, seed // 256 % 256, seed // 65536 % 256)
        facts |= {"take": sample.take, "seed": seed}
    if sample.low_res and "seed" in sample.low_res.meta:
        facts["low_res_seed"] = sample.low_res.meta["seed"]
    return {
        "png": png((color[0], color[1], color[2]), (size, size)),
        "json": canonical_json(facts).encode(),
        "txt": sample.prompt.encode(),
    }


def _fails(sample: Sample, stage: str) -> bool:
    return f"{BAD} {stage}" in sample.prompt


def low_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        if _fails(sample, "low_res"):
            yield Output(sample.key, error=SampleError("told to fail"))
        else:
            yield Output(sample.key, files=files_of(sample, 16))


def captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        assert sample.low_res is not None
        assert sample.low_res.open().size == (16, 16)
        seen = f" (seed {sample.low_res.meta['seed']})" if "seed" in sample.low_res.meta else ""
        row = {
            "grid": "64x64/32/32",
            "caption": sample.prompt + seen,
            "n_tokens": 3,
            "truncated": False,
            "model": "fake",
            "revision": "1",
            "status": "ok",
            "prompt_hash": "0",
        }
        boxes = [
            (r, c, {"y0": 32 * r, "x0": 32 * c, "y1": 32 * r + 32, "x1": 32 * c + 32}) for r in (0, 1) for c in (0, 1)
        ]
        yield Output(sample.key, rows=[{**row, "row": r, "col": c, **box} for r, c, box in reversed(boxes)])


def high_res(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        assert sample.low_res is not None
        assert [(row["row"], row["col"]) for row in sample.captions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        count_call(4, 1.0)
        if _fails(sample, "high_res"):
            yield Output(sample.key, error=SampleError("told to fail"))
        else:
            yield Output(sample.key, files=files_of(sample, 64))


def quality(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        assert sample.low_res is not None
        assert sample.high_res is not None
        width, height = sample.high_res.open().size
        row = {
            "width": width,
            "height": height,
            "clip_score": None,
            "agreement_psnr": 30.0,
            "agreement_ssim": 0.9,
            "detail_energy": 0.1,
            "seam": 1.0,
            "seam_worst": 0.0,
            "lost_worst": 0.2,
            "added_worst": 0.2,
            "colour_worst": 2.0,
            "clipped": 0.0,
            "phash": hashlib.sha256(sample.high_res.data).hexdigest()[:16] if sample.take else sample.key[:16],
            "luminance_mean": 100.0,
            "luminance_std": 10.0,
            "flags": [],
        }
        yield Output(sample.key, rows=[row])


def recaptions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    for sample in samples:
        assert sample.high_res is not None
        assert sample.high_res.open().size == (64, 64)
        if _fails(sample, "recaptions"):
            yield Output(sample.key, error=SampleError("told to fail"))
        else:
            row = {"model": "fake", "revision": "1", "status": "ok"}
            texts = {style: f"{style} of {sample.prompt}" for style in sorted(config.recaption.styles)}
            yield Output(sample.key, rows=[{**row, "style": style, "caption": text} for style, text in texts.items()])


def _batch_facts(samples: Sequence[Sample], place: int, size: int) -> dict[str, int]:
    """What the bytes of a sample may depend on beside the sample: its slot, its place there, and the device's batch."""
    return {"slot": len(samples), "place": place, "batch": size, "call": min(size, len(samples) - place // size * size)}


def _in_batch(sample: Sample, size: int, facts: dict[str, int]) -> dict[str, bytes]:
    """The files of an image of `size` px in which `facts` can be seen."""
    color = bytes.fromhex(sample.key)[0], facts["slot"] % 16 * 16 + facts["place"] % 16, facts["batch"] % 256
    facts = {**facts, "take": sample.take} if sample.take else facts
    image = {"png": png(color, (size, size)), "json": canonical_json({"key": sample.key, **facts}).encode()}
    return {**files_of(sample, size), **image}


def batch_dependent(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """A low_res stage whose bytes depend on the batch, as on a device that rounds: on the number of samples in the
    slot, on the place of the sample there, and on the batch size."""
    for place, sample in enumerate(samples):
        if _fails(sample, "low_res"):
            yield Output(sample.key, error=SampleError("told to fail"))
        else:
            facts = _batch_facts(samples, place, config.low_res.batch_size)
            yield Output(sample.key, files=_in_batch(sample, 16, facts))


def batch_dependent_captions(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
    """`captions`, whose rows depend on the batch size."""
    for output in captions(config, samples):
        yield replace(output, rows=[{**row, "n_tokens": config.captions.batch_size} for row in output.rows])


def batch_dependent_high_res(device_views: int) -> Process:
    """`high_res`, whose bytes depend on the views per call. Where nothing is set, the device takes `device_views`."""

    def process(config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        views = config.upscale.view_batch or device_views
        for place, sample in enumerate(samples):
            files = _in_batch(sample, 64, _batch_facts(samples, place, views))
            yield Output(sample.key, files=files, batch_size=views)

    return process


FAKES: dict[str, Process] = {"low_res": low_res, "captions": captions, "high_res": high_res, "quality": quality}
"""Of the stages that every dataset needs if its method reads captions."""
EVERY_FAKE: dict[str, Process] = {**FAKES, "recaptions": recaptions}
BATCH_DEPENDENT: dict[str, Process] = {
    "low_res": batch_dependent,
    "captions": batch_dependent_captions,
    "high_res": batch_dependent_high_res(16),
    "quality": quality,
}
