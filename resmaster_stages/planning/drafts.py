"""Reads the samples that a configuration asks for, from its prompts or images. Writes nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.image_format import lossless_format
from resmaster_stages.dataset.plan import Duplicate, Rejected, SampleSpec
from resmaster_stages.diffusion.views import OTHER_SIZE, target_size, why_not_wrapping
from resmaster_stages.errors import PlanError, SampleError
from resmaster_stages.keys import image_key, masked_key, normalise_prompt, prompt_key
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.planning.prompt_files import read_prompts
from resmaster_stages.redaction import one_line, printable, without_credentials
from resmaster_stages.storage.credentials import embedded_credentials
from resmaster_stages.storage.digests import DigestSet
from resmaster_stages.storage.generation import Generation
from resmaster_stages.storage.images import image_size, why_unstorable
from resmaster_stages.storage.masks import check_mask, mask_of_row
from resmaster_stages.storage.sources import LoneTexts, find_images

MAX_PROMPT_CHARACTERS = 2000


SHOWN_CHARACTERS = 80
KEPT_INPUTS = 10
"""How many of the inputs that are left out are kept to be shown."""

T = TypeVar("T")


def require_source(config: DatasetConfig) -> None:
    """Raise PlanError if the configuration names neither prompts nor images."""
    if not config.prompts and not config.images:
        raise PlanError("nothing to plan: give prompts or images in the configuration, or --prompts or --images")


@dataclass
class LeftOut(Generic[T]):
    """Counts inputs that are left out, of which there may be millions, and keeps the first ones."""

    also: Callable[[T], object] | None = None
    """Gets each of them."""
    count: int = 0
    first: list[T] = field(default_factory=list)

    def add(self, item: T) -> None:
        """Count one."""
        self.count += 1
        if len(self.first) < KEPT_INPUTS:
            self.first.append(item)
        if self.also is not None:
            self.also(item)


@dataclass
class Noticed:
    """What is to be said of images that are used: how many said something themselves."""

    prompts: int = 0
    """Images whose prompt is read from the image file."""
    unusable: int = 0
    """Images whose file holds a prompt that cannot be used, so that they have none."""
    credentials: int = 0
    """Images with content credentials."""

    def __str__(self) -> str:
        lines = {
            "a prompt that is read from the image file": self.prompts,
            "a prompt in the image file that cannot be used": self.unusable,
            "content credentials (C2PA), which results do not carry": self.credentials,
        }
        return "; ".join(
            f"{count} {'images have' if count > 1 else 'image has'} {what}" for what, count in lines.items() if count
        )


class DraftReader:
    """Iterates once over the samples that a configuration asks for, each once and in order, as they are read.

    Memory holds a 12-byte digest per sample and the source of each image.
    Raises UserError for a source that cannot be read, at the latest at the place that cannot be read; ConfigError if
    the source gives detail masks that the configuration does not read; and PlanError at the end if the source gave no
    usable sample. An excluded input counts for the limit, so that others do not take its place.
    """

    def __init__(
        self,
        config: DatasetConfig,
        reject: Callable[[Rejected], object] | None = None,
        repeat: Callable[[Duplicate], object] | None = None,
        excluded: Callable[[str], str] = lambda key: "",
    ) -> None:
        """reject, repeat: get each input that is left out, as soon as it is. excluded: why a key is left out, or ""."""
        self.rejected = LeftOut[Rejected](reject)
        """Inputs rejected so far."""
        self.duplicates = LeftOut[Duplicate](repeat)
        """Inputs so far that equal an earlier input."""
        self.lone_texts = LoneTexts()
        """Texts so far that lie beside images, but belong to no image."""
        self.noticed = Noticed()
        """What images so far said themselves."""
        self._config, self._excluded = config, excluded
        require_source(config)
        if config.images:
            self._specs = _specs_of_images(config, self)
        else:
            self._specs = _specs_of_prompts(config, self.rejected)

    def __iter__(self) -> Iterator[SampleSpec]:
        config, seen, inputs, samples = self._config, DigestSet(), 0, 0
        images: dict[str, str] = {}  # key -> source
        for place, replicas in self._specs:
            if config.limit is not None and inputs >= config.limit:
                break
            first, fresh = "", False
            for spec in replicas:
                first = first or spec.key
                if not seen.add(bytes.fromhex(spec.key)):
                    continue
                fresh = True
                if reason := self._excluded(spec.key):
                    which = f"replica {spec.replica}: " if config.replicas > 1 else ""
                    self.rejected.add(_rejection(place, spec.prompt, which + reason))
                else:
                    samples += 1
                    yield spec
            inputs += fresh
            if not fresh:
                self.duplicates.add(Duplicate(printable(place), first, images.get(first)))
            elif config.images:
                images[first] = place
        if not samples:
            first = f"; first: {self.rejected.first[0]}" if self.rejected.count else ""
            source = str(config.images or config.prompts)
            raise PlanError(f"{without_credentials(source)}: nothing usable in it{first}")


@dataclass(frozen=True)
class Draft:
    """The samples that a configuration asks for, in order and without duplicates, and the rejected inputs."""

    samples: tuple[SampleSpec, ...]
    rejected: tuple[Rejected, ...]
    duplicates: tuple[Duplicate, ...]


def draft_samples(config: DatasetConfig) -> Draft:
    """All samples that `config` asks for. Writes nothing. Raises the same errors as `DraftReader`."""
    rejected: list[Rejected] = []
    duplicates: list[Duplicate] = []
    samples = tuple(DraftReader(config, rejected.append, duplicates.append))
    return Draft(samples, tuple(rejected), tuple(duplicates))


def _specs_of_prompts(config: DatasetConfig, rejected: LeftOut[Rejected]) -> Iterator[tuple[str, Iterator[SampleSpec]]]:
    """(place, replicas) of each usable prompt. Unusable prompts are added to `rejected`."""
    height, width = _base_size(config)
    for raw in read_prompts(str(config.prompts)):
        negative = "" if raw.negative_prompt is None else raw.negative_prompt
        reason = "empty" if raw.prompt is None else why_unusable(raw.prompt)
        if reason is None and negative != "" and (reason := why_unusable(negative, may_be_empty=True)):
            reason = f"negative prompt: {reason}"
        if reason is not None:
            rejected.add(_rejection(raw.source, raw.prompt, reason))
            continue
        prompt, negative = normalise_prompt(raw.prompt), normalise_prompt(negative)
        source = mask = None
        if raw.detail_mask is not None:
            config.upscale.require_detail_mask(f"{raw.source}: gives")
            try:
                source, mask = mask_of_row(str(config.prompts), raw.detail_mask, raw.row)
            except SampleError as error:
                named = f"{raw.detail_mask[:SHOWN_CHARACTERS]}: " if isinstance(raw.detail_mask, str) else ""
                rejected.add(_rejection(raw.source, raw.prompt, f"its detail mask: {named}{error}"))
                continue
        keys = map(partial(prompt_key, prompt, negative, height, width), range(config.replicas))
        spec = partial(SampleSpec, prompt=prompt, negative_prompt=negative, height=height, width=width, source=source)
        yield raw.source, _replicas(spec, keys, mask)


def _specs_of_images(config: DatasetConfig, reader: DraftReader) -> Iterator[tuple[str, Iterator[SampleSpec]]]:
    """(place, replicas) of each usable image. What else is found is added to the lists of `reader`."""
    rejected, noticed = reader.rejected, reader.noticed
    for image in find_images(str(config.images), reader.lone_texts):
        if image.problem:
            rejected.add(_rejection(image.source, "", image.problem))
            continue
        reason = why_unusable(image.prompt, may_be_empty=True)
        if reason is not None:
            rejected.add(_rejection(image.source, image.prompt, f"its prompt: {reason}"))
            continue
        try:
            height, width = image_size(image.data, image.source)
        except SampleError as error:
            rejected.add(_rejection(image.source, "", str(error).removeprefix(f"{image.source}: ")))
            continue
        if reason := why_too_large(config, height, width) or why_unwrappable(config, height, width):
            rejected.add(_rejection(image.source, "", reason))
            continue
        prompt, negative = normalise_prompt(image.prompt), ""
        if image.generation is not None and config.image_metadata != "none":
            prompt, negative = _prompts_of(image.generation, noticed)
        noticed.credentials += bool(embedded_credentials(image.data))
        if image.mask is not None:
            config.upscale.require_detail_mask(f"{image.source}: has beside it")
            try:
                check_mask(image.mask)
            except SampleError as error:
                rejected.add(_rejection(image.source, image.prompt, f"its detail mask: {error}"))
                continue
        keys = map(partial(image_key, image.data, prompt), range(config.replicas))
        spec = partial(
            SampleSpec,
            prompt=prompt,
            negative_prompt=negative,
            height=height,
            width=width,
            source=image.source,
        )
        yield image.source, _replicas(spec, keys, image.mask)


def _prompts_of(generation: Generation, noticed: Noticed) -> tuple[str, str]:
    """The prompt and negative prompt that an image file says. Those that cannot be used are none, because the image can
    be used all the same."""
    if why_unusable(generation.prompt) or why_unusable(generation.negative_prompt, may_be_empty=True):
        noticed.unusable += 1
        return "", ""
    noticed.prompts += 1
    return normalise_prompt(generation.prompt), normalise_prompt(generation.negative_prompt)


def _replicas(spec: Callable[..., SampleSpec], keys: Iterable[str], mask: bytes | None) -> Iterator[SampleSpec]:
    """The replicas of an input one by one, because there may be a hundred thousand. keys: theirs, without mask."""
    for replica, key in enumerate(keys):
        yield spec(key=key if mask is None else masked_key(key, mask), replica=replica)


def _base_size(config: DatasetConfig) -> tuple[int, int]:
    """(height, width) in px of the low-res images; the model's native size if the configuration gives none."""
    height, width = config.low_res.height, config.low_res.width
    if height is None or width is None:
        from resmaster_stages.models.geometry import geometry_of

        native = geometry_of(config.model).native_px
        height, width = height or native, width or native
    return height, width


def why_too_large(config: DatasetConfig, height: int, width: int) -> str:
    """Why a dataset cannot hold a low-res image of `height` x `width` px and its high-res image; "" if it can."""
    if reason := why_unstorable(height, width, lossless_format(config.image_format)):
        return reason
    enlarged = why_unstorable(*target_size(height, width, config.upscale.scale), config.image_format)
    return enlarged and f"its high-res image: {enlarged}"


def why_unwrappable(config: DatasetConfig, height: int, width: int) -> str:
    """Why the large images of a low-res image of `height` x `width` px cannot continue at their opposite borders, as
    `upscale.wrap` asks; "" if they can, or need not."""
    method = config.upscale
    if not isinstance(method, Diffusion) or not any(method.wraps):
        return ""
    from resmaster_stages.models.geometry import geometry_of

    geometry = geometry_of(config.model)
    for scale in (*method.via, method.scale):
        if reason := why_not_wrapping(geometry, *target_size(height, width, scale), method.wraps):
            return f"at {scale:g}x its {reason}; {OTHER_SIZE}"
    return ""


def why_unusable(text: Any, may_be_empty: bool = False) -> str | None:
    """Why a value cannot be a prompt, in a few words; None if it is usable."""
    if not isinstance(text, str):
        return "not text"
    if len(text) > MAX_PROMPT_CHARACTERS and len(normalise_prompt(text)) > MAX_PROMPT_CHARACTERS:
        return f"longer than {MAX_PROMPT_CHARACTERS} characters"
    kinds = {unicodedata.category(character) for character in text if not character.isspace()}
    if "Cc" in kinds:
        return "control characters"
    if "Cs" in kinds:
        return "not valid Unicode"
    if not may_be_empty and kinds <= {"Cf"}:  # blank, or nothing but invisible format characters
        return "empty"
    return None


def _rejection(source: str, value: Any, reason: str) -> Rejected:
    text = "" if value is None else (value if isinstance(value, str) else repr(value))[:SHOWN_CHARACTERS]
    return Rejected(one_line(source), text.encode("utf-8", "replace").decode(), one_line(reason))
