"""Finds out under which licence a model is: from the card in its folder or the local hub cache, else from a table.

A card is a file README.md that begins with YAML between two lines `---`, as hubs have it. It is foreign text: whatever
is in it, the worst result is a licence that is not stated. Nothing is downloaded and no weights are read.

Invariant: a licence that neither a card nor the table states is not guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resmaster_stages.config.dataset import SCORES, DatasetConfig
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.identity import pack_folder
from resmaster_stages.models.places import at_hub, location
from resmaster_stages.redaction import holds_credentials
from resmaster_stages.storage.filesystem import open_regular

HUB = "https://huggingface.co/"

LONGEST_HEADER_BYTES = 65_536
"""Longest header of a card that is read."""

_HEADER = re.compile(rb"\A(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"(?=.*[^\W\d_])[\w .,+()/:-]{1,100}")
"""A name of a licence, without characters that mean something in a table of Markdown."""
_URL = re.compile(r"https?://[\w.~:/?#@!$&'*+,;=%-]{1,300}")
_FILE = re.compile(r"(?!.*\.\.)\w[\w./-]{0,100}")
_NO_NAME = {"none", "null", "true", "false", "yes", "no", "unknown"}
_NON_COMMERCIAL = re.compile(r"non[-_ ]?commercial|(?<![a-z0-9])nc(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Licence:
    """The licence of a model."""

    name: str | None
    """As the model's card has it, e.g. `apache-2.0`. None if it is not stated."""
    link: str | None = None
    """The URL at which it is to be read."""

    @property
    def non_commercial(self) -> bool:
        """Whether its name says that commercial use is not allowed."""
        return self.name is not None and bool(_NON_COMMERCIAL.search(self.name))

    def sentence(self) -> str:
        """The licence in one line."""
        if self.name is None:
            return "not stated; read the model's page"
        limit = ", which does not allow commercial use of the model" if self.non_commercial else ""
        return f"{self.name}{limit}" + (f" ({self.link})" if self.link else "")


@dataclass(frozen=True)
class Licensed:
    """A model that a dataset is made with."""

    part: str
    """What the model is to the dataset."""
    model: str
    """Its hub id or folder."""
    licence: Licence


OWN = Licence("apache-2.0")
"""The licence of this project, and of the weights that it made itself."""

_FLUX_1 = "flux-1-dev-non-commercial-license"
_FLUX_2 = "flux-non-commercial-license"
_STABILITY = "stabilityai-ai-community"

KNOWN: dict[str, str] = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "bytedance/sdxl-lightning": "openrail++",
    "latent-consistency/lcm-lora-sdxl": "openrail++",
    "tianweiy/dmd2": "cc-by-nc-4.0",
    "compvis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-3-medium": _STABILITY,
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-nc-research-community",
    "stabilityai/stable-diffusion-3.5-medium": _STABILITY,
    "stabilityai/stable-diffusion-3.5-large": _STABILITY,
    "stabilityai/stable-diffusion-3.5-large-turbo": _STABILITY,
    "black-forest-labs/flux.1-dev": _FLUX_1,
    "black-forest-labs/flux.1-krea-dev": _FLUX_1,
    "black-forest-labs/flux.1-redux-dev": _FLUX_1,
    "black-forest-labs/flux.1-schnell": "apache-2.0",
    "black-forest-labs/flux.2-dev": _FLUX_2,
    "black-forest-labs/flux.2-klein-4b": "apache-2.0",
    "black-forest-labs/flux.2-klein-base-4b": "apache-2.0",
    "black-forest-labs/flux.2-klein-9b": _FLUX_2,
    "black-forest-labs/flux.2-klein-base-9b": _FLUX_2,
    "lodestones/chroma": "apache-2.0",
    "lodestones/chroma1-base": "apache-2.0",
    "lodestones/chroma1-hd": "apache-2.0",
    "pixart-alpha/pixart-xl-2-512x512": "openrail++",
    "pixart-alpha/pixart-xl-2-1024-ms": "openrail++",
    "pixart-alpha/pixart-sigma-xl-2-512-ms": "openrail++",
    "pixart-alpha/pixart-sigma-xl-2-1024-ms": "openrail++",
    "qwen/qwen-image": "apache-2.0",
    "tongyi-mai/z-image": "apache-2.0",
    "tongyi-mai/z-image-turbo": "apache-2.0",
    "madebyollin/sdxl-vae-fp16-fix": "mit",
    "h94/ip-adapter": "apache-2.0",
    "xinsir/controlnet-tile-sdxl-1.0": "apache-2.0",
    "xinsir/controlnet-union-sdxl-1.0": "apache-2.0",
    "diffusers/controlnet-canny-sdxl-1.0": "openrail++",
    "xlabs-ai/flux-ip-adapter": _FLUX_1,
    "xlabs-ai/flux-ip-adapter-v2": _FLUX_1,
    "salesforce/blip-image-captioning-large": "bsd-3-clause",
    "qwen/qwen3-vl-4b-instruct": "apache-2.0",
    "falconsai/nsfw_image_detection": "apache-2.0",
    "adamcodd/vit-base-nsfw-detector": "apache-2.0",
    "amrul-hzz/watermark_detector": "apache-2.0",
    "cafeai/cafe_aesthetic": "agpl-3.0",
}
"""Hub id in small letters -> licence, as the models' pages had it in 2026. A model's own card counts more."""


def licences_of(config: DatasetConfig) -> tuple[Licensed, ...]:
    """The models that a dataset's images are made or scored with, each with its licence. Models of a server are not
    known."""
    model, method, captions = config.model, config.upscale, config.captions
    named: list[tuple[str, str, str | None]] = []
    if uses_base_model(config):
        named.append(("base model", model.id, model.revision))
        if model.vae is not None:
            named.append(("VAE", model.vae, None))
    if model.few_step is not None and method.base_model:
        named.append(("few-step weights", model.few_step.id, model.few_step.revision))
    if model.ip_adapter is not None and method.uses("image_prompt"):
        named.append(("IP-Adapter", model.ip_adapter.id, model.ip_adapter.revision))
    if model.controlnet is not None and method.uses("control"):
        named.append(("ControlNet", model.controlnet.id, model.controlnet.revision))
    named += method.networks()
    if method.uses("captions") and captions.source == "model":
        named.append(("captioner", captions.model, captions.revision))
    for name in SCORES:
        if (score := getattr(config.quality, name)) is not None:
            named.append((f"{name} score", score.model, score.revision))
    recaptioner = config.recaptioner()
    if config.recaption.styles and recaptioner.source == "model":
        named.append(("captioner of large images", recaptioner.model, recaptioner.revision))
    return tuple(Licensed(part, name, licence_of(name, revision)) for part, name, revision in named)


def uses_base_model(config: DatasetConfig) -> bool:
    """Whether a dataset's images depend on its base model."""
    return not config.images or config.upscale.base_model


def licence_of(model: str, revision: str | None = None) -> Licence:
    """The licence of a model: of the embedded pack, a hub id or a folder."""
    try:
        folder = None if at_hub(model) else Path(location(model))
    except ConfigError:  # a folder of another machine, where the images were made
        return Licence(None)
    if folder is not None:
        return OWN if folder == pack_folder() else _stated(folder / "README.md", None) or Licence(None)
    page = f"{HUB}{model}"
    card = _cached_card(model, revision)
    if card is not None and (found := _stated(card, f"{page}/blob/{revision or 'main'}/")):
        return found if found.link else Licence(found.name, page)
    name = KNOWN.get(model.lower())
    return Licence(name, page) if name else Licence(None)


def _cached_card(model: str, revision: str | None) -> Path | None:
    """The card of a hub id in the local cache, or None."""
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(model, "README.md", revision=revision)
    except ValueError:  # no valid hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _stated(card: Path, beside: str | None) -> Licence | None:
    """The licence that a card states, or None. beside: the URL of files that lie beside the card, if there is one."""
    header = _header(card)
    name, link = _name_in(header.get("license")), header.get("license_link")
    if name == "other":
        name = _name_in(header.get("license_name")) or name
    if name is None:
        return None
    if not isinstance(link, str) or holds_credentials(link):
        return Licence(name)
    if _URL.fullmatch(link):
        return Licence(name, link)
    return Licence(name, f"{beside}{link}" if beside and _FILE.fullmatch(link) else None)


def _name_in(value: Any) -> str | None:
    """The name of a licence, or of several. None for what is no name."""
    names = value if isinstance(value, list) else [value]
    if not 0 < len(names) <= 5:
        return None
    if not all(isinstance(each, str) and _NAME.fullmatch(each) and each.lower() not in _NO_NAME for each in names):
        return None
    return " and ".join(names)


def _header(card: Path) -> dict[str, Any]:
    """The header of a card, with text for every single value; empty if it cannot be read."""
    try:
        with open_regular(str(card)) as file:
            found = _HEADER.match(file.read(LONGEST_HEADER_BYTES))
        # BaseLoader makes no numbers, no dates and no merged mappings, so a small text cannot become a large value.
        values = yaml.load(found[1].decode(), yaml.BaseLoader) if found else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
