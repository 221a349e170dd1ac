"""What the families of transformers share before weights are loaded: sizes, path, checks and loading, from a `Kind`.

A file of this folder describes its family by a `Kind`: a table of what is special to it. `family_of_kind` makes the
`Family` of it. What a kind reads are the configurations of a model (`Facts`), which are the same in its files and in a
loaded pipeline. So a user's own pipeline is judged as a folder is.

Invariant: what is refused here is refused, in the same words, when the model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from resmaster_stages.config.model import ModelConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.bases.base import (
    NO_ADAPTER,
    NO_TIME_SHIFT,
    Ability,
    Asked,
    Base,
    Demand,
    Family,
    Geometry,
    Sampling,
    TokenCounter,
    network_of,
    require_readable,
    require_sampling,
    sized,
)
from resmaster_stages.models.files import (
    DIFFUSERS,
    TRANSFORMERS,
    Check,
    folder_with,
    require_tokenizer,
    require_weights,
)
from resmaster_stages.models.flow import flow_path
from resmaster_stages.models.places import ModelFiles, loading, location, vae_dtype
from resmaster_stages.models.schedule import Course, Step, Timing, course_of, require_falling

if TYPE_CHECKING:
    import torch

MOST_PX = 65_536
"""Larger than any model's views, as `model.native_px` has it."""

NATIVE_PX = 1024
"""Native size of a model whose files do not tell it."""


@dataclass(frozen=True)
class Facts:
    """The configurations of a model: of a folder, a hub id or a loaded pipeline."""

    name: str
    """The model's id, folder or identity."""
    index: Mapping[str, Any]
    """Of the pipeline."""
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    """With the class as `_class_name`."""
    guidance: str = "auto"
    """`ModelConfig.guidance`."""

    def named(self, *words: str) -> bool:
        """Whether the model's name holds one of `words`."""
        return any(word in self.name.rpartition("/")[2].lower() for word in words)


@dataclass(frozen=True)
class Kind:
    """What is special to a family of transformers."""

    name: str
    pipelines: str
    """As `Family.pipelines`."""
    pipeline: str
    """Class of diffusers that loads the model."""
    transformer: str
    """Class of diffusers' denoiser."""
    vae: str
    """Class of diffusers' VAE."""
    channels: int
    """Channels of the latents, as the canvas has them. Another number means an inpainting or editing variant."""
    in_channels: Callable[[Mapping[str, Any]], int]
    """The channels of the latents, from the transformer's configuration."""
    sampling: Callable[[Facts], Sampling]
    path: Callable[[Facts, int, Timing], tuple[Step, ...]]
    """(facts, steps, timing) -> the steps. Raises ConfigError."""
    base: Callable[[Any, Facts, Geometry], Base]
    """(pipeline, facts, sizes) -> its loaded parts."""
    live: float
    """Values in memory at once while the transformer computes in half precision, per value of its tokens. A test checks
    that it is within 10 % of what is allocated step by step, for the shapes of the family's models."""
    older: str = ""
    """Name that diffusers' denoiser had when the first models were published."""
    require: Callable[[Facts], None] = lambda facts: None
    """Raises ConfigError for variants that the engine cannot use and that no other field recognises."""
    vae_channels: Callable[[Mapping[str, Any]], int | None] = lambda vae: vae.get("latent_channels")
    """Channels of the VAE's latents, from its configuration."""
    tokenizer: str = "tokenizer"
    """Folder of the tokenizer that counts a caption's tokens. Models without it count with `tokenizer`."""
    plain_tokenizer: bool = False
    """Whether a model's tokenizer may lie inside a processor of texts and images. Only the tokenizer is loaded then,
    because such a processor needs torchvision."""
    tokens: Callable[[Facts], int] = lambda facts: 512
    """Tokens that the text encoder reads, with marks and template."""
    template: int = 0
    """Tokens of the chat template that is put around every text."""
    chat: bool = False
    """Whether this is the chat template of the tokenizer, without which no text can be encoded."""
    abilities: frozenset[Ability] = field(default_factory=frozenset)
    factor: Callable[[Mapping[str, Any]], int] = lambda vae: 2 ** (len(vae["block_out_channels"]) - 1)
    """Pixels per latent along one axis, from the VAE's configuration."""
    multiple: int = 2
    """As `Geometry.multiple`."""
    largest_px: Callable[[Facts, int], int | None] = lambda facts, factor: None
    """(facts, px per latent) -> `Geometry.largest_px`."""
    shifted: bool = True
    """Whether the path can have a time shift."""
    native_px: Callable[[Facts, int], int | None] = lambda facts, factor: facts.vae.get("sample_size")
    """(facts, px per latent) -> native size. None: `NATIVE_PX`."""
    parts: tuple[str, ...] = ()
    """Parts of the pipeline that are loaded as None: safety checkers and the like."""
    adapter_checks: Callable[[ModelConfig], Iterator[Check]] = lambda config: iter(())
    """What can be checked of `model.ip_adapter`."""
    load_adapter: Callable[[Any, ModelConfig, torch.dtype], None] | None = None
    """Loads `model.ip_adapter` into a pipeline. None: the family takes none."""


def facts_of(config: ModelConfig) -> Facts:
    """The facts of a model's files. Raises ConfigError."""
    files = ModelFiles(config.id, config.revision)
    index = files.json("model_index.json")
    scheduler, named = files.json("scheduler/scheduler_config.json"), index.get("scheduler")
    if isinstance(named, list) and len(named) == 2:  # diffusers goes by the index
        scheduler = {**scheduler, "_class_name": named[1]}
    vae = ModelFiles(config.vae).json("config.json") if config.vae else files.json("vae/config.json")
    return Facts(
        name=config.id,
        index=index,
        transformer=files.json("transformer/config.json"),
        vae=vae,
        scheduler=scheduler,
        guidance=config.guidance,
    )


def facts_of_pipeline(pipe: Any, config: ModelConfig) -> Facts:
    """The facts of a loaded pipeline."""
    index = dict(pipe.config)
    return Facts(
        name=config.id if "id" in config.model_fields_set else str(index.get("_name_or_path") or config.id),
        index=index,
        transformer=_config_of(pipe.transformer),
        vae=_config_of(pipe.vae),
        scheduler={**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__},
        guidance=config.guidance,
    )


def _config_of(part: Any) -> dict[str, Any]:
    """A part's configuration, with the class of diffusers that it is or comes from."""
    classes = type(network_of(part)).__mro__
    name = next((each.__name__ for each in classes if each.__module__.startswith("diffusers.")), classes[0].__name__)
    return {**part.config, "_class_name": name}


def sizes(kind: Kind, facts: Facts, config: ModelConfig) -> Geometry:
    """The sizes of a model. Raises ConfigError."""
    try:
        factor = int(kind.factor(facts.vae))
        native = int(kind.native_px(facts, factor) or NATIVE_PX)
        largest = kind.largest_px(facts, factor)
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model {facts.name!r}: its configuration does not tell its sizes ({type(error).__name__}: {error}); "
            "download the model again, or use another"
        ) from None
    if factor < 1 or not all(factor <= side <= MOST_PX for side in (native, native if largest is None else largest)):
        raise ConfigError(f"model {facts.name!r}: its configuration has impossible sizes; download the model again")
    geometry = Geometry(sized(config, native, factor * kind.multiple), factor, kind.multiple, largest)
    require_readable(geometry, geometry.native_px, geometry.native_px, "model.native_px", f"set it to {largest}")
    return geometry


def require_kind(kind: Kind, facts: Facts) -> None:
    """Raise ConfigError for variants that the engine cannot use."""
    name = facts.transformer.get("_class_name", kind.transformer)
    if name not in (kind.transformer, kind.older):
        raise ConfigError(f"its transformer is a {name}, not a {kind.transformer}; give a base model")
    if (vae := facts.vae.get("_class_name", kind.vae)) != kind.vae:
        raise ConfigError(f"its VAE is {vae!r}, not an {kind.vae}; give another VAE, or null")
    try:
        channels = kind.in_channels(facts.transformer)
    except (LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"transformer/config.json tells no channels ({reason}); download the model again") from None
    made = kind.vae_channels(facts.vae)
    if channels != made:
        raise ConfigError(
            f"its transformer reads {channels} channels, and its VAE makes {made}; it is "
            "an inpainting, editing or control variant; give a plain base model"
        )
    _require_affine(facts.vae)
    kind.require(facts)


def _require_affine(vae: Mapping[str, Any]) -> None:
    """Raise ConfigError for a damaged scale or shift of a VAE's latents."""
    scale, shift = vae.get("scaling_factor", 1.0), vae.get("shift_factor")
    if not is_number(scale) or scale <= 0:
        raise ConfigError(f"vae/config.json: scaling_factor is {scale!r}, not a number above 0; download it again")
    if shift is not None and not is_number(shift):
        raise ConfigError(f"vae/config.json: shift_factor is {shift!r}, not a number; download it again")


def is_number(value: object) -> bool:
    """Whether a value of a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def family_of_kind(kind: Kind) -> Family:
    """The family that a kind describes."""
    return Family(
        name=kind.name,
        pipelines=kind.pipelines,
        abilities=kind.abilities,
        geometry=lambda config: sizes(kind, facts_of(config), config),
        token_counter=partial(_token_counter, kind),
        content_tokens=partial(_content_tokens, kind),
        load=partial(_load, kind),
        base=partial(_base, kind),
        checks=partial(_checks, kind),
        sampling=lambda config: kind.sampling(facts_of(config)),
        course=partial(_course, kind),
        half="bfloat16",
        large_text=True,
    )


def path_of(kind: Kind, facts: Facts, steps: int, timing: Timing) -> tuple[Step, ...]:
    """The steps of a model's path. A flow path through timesteps has the noise levels of a thousandth of them, and no
    time shift. Raises ConfigError."""
    if not timing.timesteps or not kind.shifted:
        return kind.path(facts, steps, timing)
    require_falling(timing.timesteps, 1000)
    return flow_path([*(t / 1000 for t in timing.timesteps), 0.0])


def _course(kind: Kind, config: ModelConfig, steps: int, timing: Timing) -> Course:
    facts = facts_of(config)
    return course_of(path_of(kind, facts, steps, timing), kind.sampling(facts).kind == "cfg")


@lru_cache(maxsize=4)
def _tokenizer(kind: Kind, config: ModelConfig) -> Any:
    """The tokenizer that counts a caption's tokens. Raises ConfigError."""
    from transformers import AutoTokenizer

    folder = kind.tokenizer if has(facts_of(config).index, kind.tokenizer) else "tokenizer"
    with loading(config.id, "its tokenizer"):
        return AutoTokenizer.from_pretrained(location(config.id), subfolder=folder, revision=config.revision or "main")


def _token_counter(kind: Kind, config: ModelConfig) -> TokenCounter:
    tokenizer = _tokenizer(kind, config)
    return lambda text: len(content(tokenizer, [text])[0])


def _content_tokens(kind: Kind, config: ModelConfig) -> int:
    tokenizer = _tokenizer(kind, config)
    return longest(kind, facts_of(config), tokenizer) - added(kind, tokenizer)


def content(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without marks."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def added(kind: Kind, tokenizer: Any) -> int:
    """The number of tokens that are added to every text: marks and a template."""
    return len(tokenizer("").input_ids) + kind.template


def longest(kind: Kind, facts: Facts, tokenizer: Any) -> int:
    """The tokens that are read: what the text encoder reads, or what the tokenizer is limited to."""
    return int(min(kind.tokens(facts), tokenizer.model_max_length))


def _load(kind: Kind, config: ModelConfig, dtype: torch.dtype) -> Any:
    """The pipeline on the CPU, with the configuration's VAE and adapter. Raises ConfigError."""
    import diffusers

    kinds: dict[str, Any] = {"default": dtype, "vae": vae_dtype(dtype)}
    extra: dict[str, Any] = dict.fromkeys((*kind.parts, kind.tokenizer) if kind.plain_tokenizer else kind.parts)
    if config.vae:
        with loading(config.vae, "the VAE"):
            extra["vae"] = getattr(diffusers, kind.vae).from_pretrained(
                location(config.vae), dtype=kinds["vae"], use_safetensors=True
            )
    with loading(config.id, "it"):
        pipe = getattr(diffusers, kind.pipeline).from_pretrained(
            location(config.id),
            revision=config.revision,
            variant=config.variant,
            dtype=kinds,
            use_safetensors=True,
            **extra,
        )
    if kind.plain_tokenizer:
        pipe.register_modules(**{kind.tokenizer: _tokenizer(kind, config)})
    if config.ip_adapter is not None and kind.load_adapter is not None:
        kind.load_adapter(pipe, config, dtype)
    return pipe


def _base(kind: Kind, pipe: Any, config: ModelConfig) -> Base:
    """The parts of a loaded pipeline. Raises ConfigError for variants that the engine cannot use."""
    facts = facts_of_pipeline(pipe, config)
    require_kind(kind, facts)
    if kind.chat:
        _require_chat(pipe.tokenizer)
    return kind.base(pipe, facts, sizes(kind, facts, config))


def _checks(kind: Kind, config: ModelConfig, demand: Demand) -> Iterator[Check]:
    """What can be checked of a model before its weights are loaded."""
    yield "model.id", lambda: require_kind(kind, facts_of(config))
    yield "model.id", partial(_check_parts, kind, config, facts_of(config).index)
    if config.vae is not None:
        yield (
            "model.vae",
            lambda: require_weights(config.vae or "", folder_with(config.vae or "", "config.json"), DIFFUSERS),
        )
    if config.ip_adapter is not None:
        yield from kind.adapter_checks(config)
    elif demand.image_prompts:
        yield "model.ip_adapter", partial(_refuse, NO_ADAPTER.format(config.id))
    if demand.time_shift and not kind.shifted:
        yield "upscale.time_shift", partial(_refuse, NO_TIME_SHIFT.format(config.id))
    for asked in demand.sampling:
        yield asked.part, partial(_check_sampling, kind, config, asked)
        yield f"{asked.part}.steps", partial(_check_path, kind, config, asked.steps or 2)


def _check_sampling(kind: Kind, config: ModelConfig, asked: Asked) -> None:
    require_sampling(kind.sampling(facts_of(config)), asked, config.id)


def _check_path(kind: Kind, config: ModelConfig, steps: int) -> None:
    kind.path(facts_of(config), steps, Timing(cells=4096))


def _check_vae(vae: str) -> None:
    require_weights(vae, folder_with(vae, "config.json"), DIFFUSERS)


def _refuse(message: str) -> None:
    raise ConfigError(message)


def has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has a part, by its index."""
    kind = index.get(part)
    return isinstance(kind, list | tuple) and None not in kind


def _check_parts(kind: Kind, config: ModelConfig, index: Mapping[str, Any]) -> None:
    """That the weights and tokenizers of all parts are there and whole."""
    for part in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer"):
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or not all(isinstance(word, str) for word in named):
            raise ConfigError(f"model_index.json names no {part}; download the model again")
    folder = folder_with(config.id, "model_index.json", config.revision)
    for part in (part for part in index if has(index, part)):
        if part == "transformer" or (part == "vae" and config.vae is None):
            require_weights(config.id, folder / part, DIFFUSERS, config.variant)
        elif re.fullmatch(r"text_encoder(_\d)?", part):
            require_weights(config.id, folder / part, TRANSFORMERS, config.variant)
        elif re.fullmatch(r"tokenizer(_\d)?", part):
            require_tokenizer(config.id, folder / part)
    if kind.chat:
        _require_chat(_tokenizer(kind, config))


def _require_chat(tokenizer: Any) -> None:
    """Raise ConfigError for a tokenizer without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("its tokenizer has no chat template; download the model again")
