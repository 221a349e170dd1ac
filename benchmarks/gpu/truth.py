"""Whether the device draws what the CPU draws: the picturebook, whose weights are trained, 128 px to 512 px.

PSNR of final images by number format against the CPU's in float32, equal bytes, other batches, memory that runs out,
and the tests marked `gpu`.
"""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.record import Run
from resmaster_stages import high_res
from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.sample import EncodedImage, Output, Sample
from resmaster_stages.dataset.stages import STAGES
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.generate import generate
from resmaster_stages.methods.resmaster import ResMaster
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.metrics.agreement import psnr
from resmaster_stages.models.acceleration import compile_blocks, quantise_fp8, require_fp8
from resmaster_stages.models.faults import release_memory
from resmaster_stages.models.load import load_models
from resmaster_stages.runner.compute import compute
from resmaster_stages.runner.quarantine import Breadcrumbs
from resmaster_stages.runner.resume import Spill
from resmaster_stages.storage.filesystem import open_root

ROOT = Path(__file__).parent.parent.parent
PROMPT = "a red house and a green tree on a green meadow on a sunny day"
FORMATS = ("float32", "bfloat16", "float16")
PROMPTS = ROOT / "resmaster_stages" / "picturebook" / "evaluation-prompts.txt"
FP8_GATE_DB = 35.0
"""PSNR that images with 8-bit layers must reach, against those without."""
OUTCOMES = {"passed": "passed", "failed": "failed", "error": "errors", "errors": "errors", "skipped": "left out"}


def difference(a: Image.Image, b: Image.Image) -> dict[str, Any]:
    """How far apart two images are, in levels of 255 and in dB (at most 100)."""
    x, y = (np.asarray(each, np.int16) for each in (a, b))
    return {"greatest_levels": int(np.abs(x - y).max()), "psnr_db": psnr(a, b)}


def model(device: str, dtype: str, compiled: str = "off") -> ModelConfig:
    """The picturebook on `device`."""
    return ModelConfig.model_validate({"device": device, "dtype": dtype, "compile": compiled})


@dataclass(frozen=True)
class Subject:
    """What is drawn again and again."""

    low_res: Image.Image
    config: ResMaster

    def drawn(self, config: ModelConfig, **values: Any) -> Image.Image:
        """The image by the models of `config`."""
        own = self.config.model_copy(update=values)
        return upscale_image(load_models(config), self.low_res, PROMPT, config=own)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, convolutions and products in float32 are computed as such, not in the matrix units' short
    format."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before):
            place.allow_tf32 = value


def formats(run: Run, subject: Subject) -> Image.Image:
    """Each number format on the device against float32 on the CPU, which is returned."""
    reference = subject.drawn(model("cpu", "float32"))
    shown = {"device": run.device, "against": "cpu, float32"}

    def near(config: ModelConfig) -> dict[str, Any]:
        return difference(subject.drawn(config), reference)

    if run.device == "cuda":
        with full_float32():
            run.record.attempt("formats", lambda: near(model("cuda", "float32")), dtype="float32, no TF32", **shown)
    for dtype in FORMATS[:2] if run.rehearse else FORMATS:
        run.record.attempt("formats", lambda dtype=dtype: near(model(run.device, dtype)), dtype=dtype, **shown)
    return reference


def eight_bits(run: Run, subject: Subject) -> dict[str, Any]:
    """Images with 8-bit linear layers against those without, both in bfloat16 and compiled; where they cannot run,
    why.

    The picturebook's layers are narrower than those that are worth it on SDXL: here all from 64 wide are taken.
    """
    models = load_models(model(run.device, "bfloat16", "off"))
    try:
        require_fp8(models.device, compiled=True)
    except ConfigError as error:
        return {"left_out": str(error)}
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:8]
    images = []
    for layers in (0, 64):
        unet = copy.deepcopy(models.base.denoiser)
        count = quantise_fp8(unet, layers) if layers else 0
        compile_blocks(unet)
        own = replace(models, base=replace(models.base, denoiser=unet))
        images.append([upscale_image(own, subject.low_res, text, config=subject.config) for text in prompts])
    found = [psnr(*pair) for pair in zip(*images)]
    return {
        "layers": count,
        "psnr_db": found,
        "least_db": min(found),
        "gate_db": FP8_GATE_DB,
        "passes": min(found) >= FP8_GATE_DB,
    }


def repeats(run: Run, subject: Subject) -> None:
    """Once more, and with other batches."""
    config = model(run.device, "float16" if run.device == "cuda" else "float32")
    first = subject.drawn(config)
    run.record.attempt(
        "repeats",
        lambda: {"same_bytes": subject.drawn(config).tobytes() == first.tobytes()},
        what=f"view_batch {subject.config.view_batch} again",
    )
    for batch in (7, 49):
        run.record.attempt(
            "repeats",
            lambda batch=batch: difference(subject.drawn(config, view_batch=batch), first),
            what=f"view_batch {batch} against {subject.config.view_batch}",
        )


class OneSample(Sequence[Sample]):
    """A shard's samples, of which there is one."""

    def __init__(self, low_res: Image.Image) -> None:
        buffer = io.BytesIO()
        low_res.save(buffer, "PNG")
        image = EncodedImage(buffer.getvalue(), "png", {"key": "0"})
        self.sample = Sample("0", 0, PROMPT, "", low_res.height, low_res.width, 0, low_res=image)
        self.planned = [self.sample]
        self.without = frozenset()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: Any) -> Any:
        return [self.sample][position]

    def keys(self) -> list[str]:
        return [self.sample.key]


@dataclass
class Stage:
    """The stage of high-res images, as a worker runs it on one sample; it notes the batches that it tried."""

    config: DatasetConfig
    samples: OneSample
    limit: int | None = None
    """Views per call above which memory is said to have run out: rehearsals have no device whose memory ends."""

    def __post_init__(self) -> None:
        self.tried: list[int] = []

    def process(self, config: DatasetConfig, samples: Sequence[Sample]) -> Iterator[Output]:
        batch = config.upscale.view_batch
        self.tried.append(batch)
        if self.limit is not None and batch > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. (rehearsed)")
        yield from high_res.process(config, samples)

    def image(self) -> Image.Image:
        """The sample's image. Raises its error."""
        with tempfile.TemporaryDirectory() as folder:
            commits, stage, keys = Commits(open_root(folder), "high_res", "0"), STAGES["high_res"], self.samples.keys()
            spill, breadcrumbs = Spill(commits, 0, None, ()), Breadcrumbs(commits, 0, keys, ())
            (output,) = compute(self.process, self.config, stage, self.samples, {}, spill, breadcrumbs)
        if output.error is not None:
            raise output.error
        return Image.open(io.BytesIO(output.files[self.config.image_format])).convert("RGB")


def dataset(run: Run, batch: int) -> DatasetConfig:
    """An image large enough that the UNet's batch decides how much memory is needed."""
    scale, dtype = (2.0, "float32") if run.rehearse else (12.0, "float16")
    upscaling = {"scale": scale, "steps": 2, "view_batch": batch, "text_prompt": {"enabled": False}}
    return DatasetConfig.model_validate(
        {
            "name": "truth",
            "prompts": "none.txt",
            "model": model(run.device, dtype).model_dump(),
            "upscale": upscaling,
        }
    )


def _peak(config: DatasetConfig, samples: OneSample) -> tuple[Image.Image, int]:
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    image = Stage(config, samples).image()
    return image, torch.cuda.max_memory_allocated()


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Within the block this process may take `size` bytes of the device's memory."""
    release_memory()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def out_of_memory(run: Run, low_res: Image.Image) -> dict[str, Any]:
    """A batch that does not fit is halved, and the image is that of the smaller batch."""
    samples, views = OneSample(low_res), 9 if run.rehearse else 529
    half = views // 2
    if run.device != "cuda":
        smaller = Stage(dataset(run, half), samples).image()
        stage = Stage(dataset(run, views), samples, limit=half)
        found = stage.image()
        return {"provoked_by": "a raised error", "tried": stage.tried, **difference(found, smaller)}
    _, needed = _peak(dataset(run, views), samples)
    smaller, enough = _peak(dataset(run, half), samples)
    limit = (needed + enough) // 2
    stage = Stage(dataset(run, views), samples)
    with memory_limit(limit):
        found = stage.image()
    return {
        "provoked_by": "a limit of the process's device memory",
        "peak_bytes": {str(views): needed, str(half): enough},
        "limit_bytes": limit,
        "tried": stage.tried,
        **difference(found, smaller),
    }


def marked_tests(seconds: float) -> dict[str, Any]:
    """The tests marked `gpu`, in a process of their own: how many passed, and what the others said."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"^(@|pytestmark = .*)pytest\.mark\.gpu", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *files]
    limit = max(30.0, seconds)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stdout or b"").decode(errors="replace")
        raise RuntimeError(f"the tests were stopped after {limit:.0f} s:\n{said[-1500:]}") from None
    last = done.stdout.strip().rpartition("\n")[2]
    counts = {OUTCOMES[what]: int(number) for number, what in re.findall(r"(\d+) (\w+)", last) if what in OUTCOMES}
    if not counts:
        raise RuntimeError(f"pytest counted nothing:\n{done.stdout[-800:]}\n{done.stderr[-800:]}")
    return {"files": files, **counts, "output": "" if done.returncode == 0 else done.stdout[-3000:]}


def measure(run: Run) -> None:
    """Formats first."""
    steps, scale = (2, 2.0) if run.rehearse else (20, 4.0)
    cpu = load_models(model("cpu", "float32"))
    (low_res,) = generate(cpu, [PROMPT], [""], [0], cpu.geometry.native_px, cpu.geometry.native_px, steps, 5.0, 1)
    if not isinstance(low_res, Image.Image):
        raise low_res
    subject = Subject(low_res, ResMaster(scale=scale, steps=steps, view_batch=16))
    reference = formats(run, subject)
    repeats(run, subject)
    run.record.attempt("out_of_memory", lambda: out_of_memory(run, low_res))
    run.record.attempt("eight_bits", lambda: eight_bits(run, subject), what="fp8 linear layers")
    run.record.attempt("marked_tests", lambda: marked_tests(run.left()))
    labels = {"dtype": "float16, compiled blocks", "device": run.device, "against": "cpu, float32"}
    if run.device == "cuda" and not run.skip("formats", 25.0, **labels):
        compiled = model("cuda", "float16", "blocks")
        run.record.attempt("formats", lambda: difference(subject.drawn(compiled), reference), **labels)
