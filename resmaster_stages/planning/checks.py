"""Checks a configuration before anything is planned or computed. Every check is in the one list of this module.

The list has everything that a stage could refuse later and that can be known earlier: sizes, steps, the files of all
models, addresses, devices. Of files, JSON and the headers of weights are read. Nothing is loaded or written. Nothing is
downloaded, but for some small JSON files of a base model at the hub, because no size is known without them.

All mistakes are told at once, one line each. Mistakes in the input are found when the input is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resmaster_stages.config.dataset import SCORES, DatasetConfig
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.reference import ReferenceConfig
from resmaster_stages.config.wrap import wrap_of, wrapped_axes
from resmaster_stages.dataset.dataset import Dataset, find_dataset
from resmaster_stages.dataset.stages import stage_hashes, stages_of
from resmaster_stages.diffusion.views import target_size
from resmaster_stages.errors import ConfigError, UserError
from resmaster_stages.methods.settings import Diffusion, Following, needs_of_wrap, unsuited_freeu
from resmaster_stages.models.bases import family_of, require
from resmaster_stages.models.bases.base import Ability, Asked, Demand, require_readable
from resmaster_stages.models.files import Check, NotOnThisMachine
from resmaster_stages.models.geometry import geometry_of
from resmaster_stages.models.licences import licences_of
from resmaster_stages.models.places import require_device_name, resolve_device
from resmaster_stages.planning.drafts import why_too_large, why_unwrappable
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.images import require_writable

LARGEST_LOW_RES = 64
"""Largest area of a generated low-res image, in native areas of the base model. It is drawn in one piece, and the work
of attention grows with the square of the area."""

NAMED = re.compile(r"(model|low_res|captions|upscale|quality|recaption)\.\w+(\.\w+)*[: ]|low_res[: ]")
"""The beginning of a message that names its setting itself."""


@dataclass(frozen=True)
class Around:
    """What is around a run: the machine, and the server or cluster."""

    here: bool = True
    """Whether the stages run in this process, so that this machine must have their devices."""
    mistakes: tuple[str, ...] = ()
    """What is wrong with the server or cluster, one line each."""


HERE = Around()
"""Around a run in this process."""


@dataclass(frozen=True)
class Checked:
    """A configuration in which no mistake was found."""

    dataset: Dataset | None
    """The existing dataset, if there is one."""
    unchecked: tuple[str, ...]
    """Settings whose models are not on this machine yet, so that nothing is known of them."""
    notes: tuple[str, ...] = ()
    """What a user should know, although it is no mistake."""


class Findings:
    """Collects mistakes, so that all of them can be told at once."""

    def __init__(self, mistakes: Iterable[str] = ()) -> None:
        self._mistakes = list(mistakes)
        self._unchecked: list[str] = []

    def look(self, checks: Iterable[Check]) -> None:
        """Do the checks, and keep what they say."""
        for setting, check in checks:
            try:
                check()
            except NotOnThisMachine as error:
                self._unchecked.append(f"{setting}: {error}")
            except UserError as error:
                found = error.mistakes if isinstance(error, ConfigError) else (str(error),)
                self._mistakes += [each if NAMED.match(each) else f"{setting}: {each}" for each in found]

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What could not be checked, each once."""
        return tuple(dict.fromkeys(self._unchecked))

    def tell(self) -> None:
        """Raise ConfigError if there are mistakes."""
        if self._mistakes:
            raise ConfigError(*dict.fromkeys(self._mistakes))


def check(config: DatasetConfig, around: Around = HERE) -> Checked:
    """Check a configuration, without its input. Raises ConfigError with a line for each mistake."""
    findings = Findings(around.mistakes)
    findings.look([("root", lambda: check_root(open_root(config.root)))])
    findings.look(checks_of(config, stages_of(config), around.here))
    findings.tell()
    findings.look([("weights", partial(stage_hashes, config))])
    findings.tell()
    return Checked(find_dataset(config), findings.unchecked, tuple(notes_of(config)))


def check_stages(config: DatasetConfig, stages: Collection[str], *, here: bool) -> None:
    """Check what `stages` of an existing dataset need. Raises ConfigError with a line for each mistake."""
    findings = Findings()
    findings.look(checks_of(config, stages, here))
    findings.tell()


def checks_of(config: DatasetConfig, stages: Collection[str], here: bool) -> Iterator[Check]:
    """What can be checked of a configuration for `stages`."""
    yield "image_format", partial(require_writable, config.image_format)
    yield "model.id", lambda: geometry_of(config.model)
    if not config.images and _is_known(config.model):
        yield "low_res", lambda: check_pieces(config, *check_sizes(config))
    yield from _of_base_model(config, stages)
    if "captions" in stages:
        yield from _of_captions(config, here)
    if "high_res" in stages:
        yield "upscale.model", config.upscale.check_files
        if isinstance(config.upscale, Following) and config.upscale.enlargement() == "network":
            yield "upscale.reference.model", partial(_check_enlarger, config.upscale.reference, config.model)
    if "quality" in stages:
        yield from _of_quality(config)
    if "recaptions" in stages:
        yield from _of_recaptions(config, here)
    for setting, name in (("model.device", config.model.device), ("quality.device", config.quality.device)):
        yield setting, partial(_check_device, name, setting, here)
    if config.model.quantise == "fp8" and here:
        yield "model.quantise", lambda: _check_fp8(config.model)


def notes_of(config: DatasetConfig) -> Iterator[str]:
    """What a user should know of a configuration that has no mistakes."""
    for each in licences_of(config):
        if each.licence.non_commercial:
            yield f"licence of the {each.part} {each.model}: {each.licence.sentence()}"
    deaf = unguided(config)
    written = [part for part in deaf if _negative_prompt(config, part)]
    if written:
        settings = " and ".join(f"{part}.negative_prompt" for part in written)
        who = " and ".join(dict.fromkeys(deaf[part] for part in written))
        yield f"{settings}: not read, because {who} has no unconditional branch"
    yield from _notes_of_wrapping(config)
    yield from unsuited_freeu(config.upscale, family_of(config.model), geometry_of(config.model), config.model.id)
    yield from config.upscale.notes(config.model)
    yield from _notes_of_recaptions(config)


def _notes_of_recaptions(config: DatasetConfig) -> Iterator[str]:
    """What a user should know of captions of finished images."""
    from resmaster_stages.models.captioner import takes_instructions

    captioner = config.recaptioner()
    with suppress(NotOnThisMachine):
        if config.recaption.styles and not takes_instructions(captioner):
            yield (
                f"recaption.styles: the captioner {captioner.model} takes no instruction, so "
                f"{' and '.join(sorted(config.recaption.styles))} is the caption that it writes of any image"
            )


def _notes_of_wrapping(config: DatasetConfig) -> Iterator[str]:
    """What a user should know of images that continue at the opposite border."""
    low, high = wrapped_axes(config.low_res.wrap), config.upscale.wraps
    missing = wrap_of((high[0] and not low[0], high[1] and not low[1]))
    follows = config.upscale.uses("reference")
    if config.images and any(high) and follows:
        yield f"upscale.wrap: {wrap_of(high)}: your images must themselves continue at the opposite border, or it shows"
    elif not config.images and missing != "none" and follows:
        yield (
            f"upscale.wrap: {wrap_of(high)}: low-res images do not continue at the opposite border, so large images "
            f"that follow them show a seam there; set low_res.wrap: {wrap_of(high)}"
        )
    elif not config.images and any(low) and not any(high) and config.upscale.scale > 1:
        yield (
            f"low_res.wrap: {config.low_res.wrap}: large images do not continue at the opposite border; set "
            f"upscale.wrap: {config.low_res.wrap} too, for a method that has it"
        )


def _negative_prompt(config: DatasetConfig, part: str) -> str:
    """The negative prompt that a user wrote in a part of the configuration; "" if none."""
    found = getattr(config, part)
    return found.negative_prompt if "negative_prompt" in found.model_fields_set else ""


def unguided(config: DatasetConfig) -> dict[str, str]:
    """Part of the configuration that denoises without an unconditional branch -> the name of its weights. Raises
    ConfigError."""
    found = {}
    for asked in sampling_of(config, stages_of(config)):
        model = config.model if asked.part == "upscale" else config.model.base
        if family_of(model).sampling(model).kind != "cfg":
            found[asked.part] = f"model.few_step {model.few_step.id}" if model.few_step else model.id
    return found


def sampling_of(config: DatasetConfig, stages: Collection[str]) -> tuple[Asked, ...]:
    """The sampling that the parts of a configuration ask the base model for."""
    asked = []
    if "low_res" in stages and not config.images:
        own = config.low_res
        asked.append(Asked("low_res", own.steps, own.guidance_scale, frozenset(own.model_fields_set)))
    if "high_res" in stages and isinstance(config.upscale, Diffusion):
        asked.append(config.upscale.asked())
    return tuple(asked)


def _of_base_model(config: DatasetConfig, stages: Collection[str]) -> Iterator[Check]:
    """What can be checked of the base model, if one of the stages computes with it."""
    if not _is_known(config.model):
        return
    family, method, asked = family_of(config.model), config.upscale, sampling_of(config, stages)
    needs: Mapping[Ability, str] = {}
    shifts, control = False, None
    if "high_res" in stages and isinstance(method, Diffusion):
        needs, shifts, control = method.needs(), method.time_shift != "view", method.controls()
    yield "upscale", partial(require, family, config.model.id, needs)
    if "low_res" in stages and not config.images:
        yield "low_res", partial(require, family, config.model.id, needs_of_wrap(config.low_res.wrap))
    if asked:
        if config.model.ip_adapter is not None:
            yield "model.ip_adapter", partial(require, family, config.model.id, {"image_prompts": "model.ip_adapter"})
        if config.model.few_step is not None:
            yield "model.few_step", partial(require, family, config.model.id, {"few_step_weights": "model.few_step"})
        if config.model.controlnet is not None:
            yield "model.controlnet", partial(require, family, config.model.id, {"control": "model.controlnet"})
        yield from family.checks(config.model, Demand("image_prompts" in needs, asked, shifts, control))


def _is_known(model: ModelConfig) -> bool:
    """Whether the sizes of a base model can be read. If not, the check of model.id tells of it."""
    try:
        geometry_of(model)
    except ConfigError:
        return False
    return True


def _of_captions(config: DatasetConfig, here: bool) -> Iterator[Check]:
    from resmaster_stages.metrics.clip_score import check_clip
    from resmaster_stages.models.captioner import check_captioner, needs, style_suffix, token_counter

    if _is_known(config.model):
        yield "captions.source", partial(require, family_of(config.model), config.model.id, needs(config.captions))
    setting = "captions.base_url" if config.captions.source == "server" else "captions.model"
    yield setting, partial(check_captioner, config.captions, here)
    if config.captions.style:
        yield "captions.style", lambda: style_suffix(config.captions.style, token_counter(config.model))
    if judge := config.caption_clip():
        own = config.captions.check.clip is not None
        yield "captions.check.clip" if own else "quality.clip", partial(check_clip, *judge)


def _of_recaptions(config: DatasetConfig, here: bool) -> Iterator[Check]:
    from resmaster_stages.models.captioner import check_captioner, require_instructions, takes_instructions, told_of

    captioner, told = config.recaptioner(), told_of(config.recaption)
    setting = f"{told.part}.base_url" if captioner.source == "server" else f"{told.part}.model"

    def look() -> None:
        check_captioner(captioner, here, told)
        require_instructions(captioner.model, config.recaption.styles, takes_instructions(captioner))

    yield setting, look


def _of_quality(config: DatasetConfig) -> Iterator[Check]:
    from resmaster_stages.metrics.clip_score import check_clip
    from resmaster_stages.metrics.features import check_extractor
    from resmaster_stages.metrics.score_models import check_score

    if config.quality.clip is not None:
        yield "quality.clip", partial(check_clip, config.quality.clip, config.quality.clip_revision)
    yield "quality.features", partial(check_extractor, config.quality)
    for name in SCORES:
        if getattr(config.quality, name) is not None:
            yield f"quality.{name}", partial(check_score, getattr(config.quality, name))


def _check_enlarger(reference: ReferenceConfig, model: ModelConfig) -> None:
    from resmaster_stages.models.latent_enlarger_files import check_latent_enlarger  # imports torch

    check_latent_enlarger(reference, model)


def _check_device(name: str, setting: str, here: bool) -> None:
    require_device_name(name, setting)
    if here and name not in ("auto", "cpu"):  # these are on every machine, and torch takes seconds to import
        resolve_device(name, setting)


def _check_fp8(model: ModelConfig) -> None:
    from resmaster_stages.models.acceleration import require_fp8

    require_fp8(resolve_device(model.device), compiled=model.compile != "off")


def check_sizes(config: DatasetConfig) -> tuple[int, int]:
    """Low-res (height, width) in px of generated images. Raises ConfigError if a size does not fit the latent grid or
    the model, or no image format."""
    geometry = geometry_of(config.model)
    factor, native = geometry.step_px, geometry.native_px
    sizes = {"height": config.low_res.height or native, "width": config.low_res.width or native}
    for name, size in sizes.items():
        if size % factor:
            below = size // factor * factor
            near = f"{below} or {below + factor}" if below else f"{factor}"
            raise ConfigError(f"low_res.{name}: {size} px is no multiple of {factor}; use {near}")
        target = size * config.upscale.scale
        if abs(target - round(target / factor) * factor) > 1e-6:  # 88 x 2.909... px may miss 256 px by a rounding error
            below = int(target // factor) * factor
            raise ConfigError(
                f"upscale.scale: {config.upscale.scale:g} x {size} px = {target:g} px, no multiple of {factor}; "
                f"use a scale of {below / size:g} or {(below + factor) / size:g}"
            )
    height, width = sizes["height"], sizes["width"]
    if reason := why_unwrappable(config, height, width):
        raise ConfigError(f"upscale.wrap: {reason}")
    if reason := why_too_large(config, height, width):
        raise ConfigError(f"low_res and upscale.scale: {reason}")
    if height * width > LARGEST_LOW_RES * native**2:
        raise ConfigError(
            f"low_res: {width} x {height} px are more than {LARGEST_LOW_RES} times the {native} x {native} px that "
            f"model {config.model.id} is made for; use smaller sizes, and enlarge them by upscale.scale"
        )
    return height, width


def check_pieces(config: DatasetConfig, height: int, width: int) -> None:
    """Raise ConfigError if the base model cannot read what is drawn in one piece: low-res images of `height` x `width`
    px and, by some methods, their high-res images."""
    geometry, method = geometry_of(config.model), config.upscale
    require_readable(geometry, height, width, "low_res", "use smaller sizes, and enlarge them by upscale.scale")
    if isinstance(method, Diffusion) and method.in_one_piece:
        target = target_size(height, width, method.scale)
        require_readable(
            geometry, *target, "upscale.method", "use a method of views, such as resmaster, or a smaller scale"
        )


def check_root(root: Folder) -> None:
    """Raise UserError if a local root cannot be written. Does not create it."""
    if not root.local:
        return
    parent = Path(root.path)
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{root.path}: cannot be written ({parent} does not allow it); choose another root")
