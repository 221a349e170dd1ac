"""Writes docs/configuration.md: every key of a configuration, from the fields and their docstrings.

python docs/configuration.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from inspect import get_annotations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from resmaster_stages.config.dataset import (
    CaptionsConfig,
    DatasetConfig,
    DispatchConfig,
    LowResConfig,
    QualityConfig,
    RecaptionConfig,
)
from resmaster_stages.config.describe import default_of, kind_of, part_in, plain, plain_text
from resmaster_stages.config.method import DEFAULT, Method, methods
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.config.part import Part
from resmaster_stages.config.structure import STRUCTURE_PRESETS, StructureConfig
from resmaster_stages.methods.settings import Diffusion

PAGE = Path(__file__).with_name("configuration.md")

EXAMPLE = """\
name: my-images                # the dataset is the folder out/my-images
root: out                      # a folder, or s3://bucket/prefix
prompts: my-prompts.txt        # one prompt per line; also .csv, .jsonl, .parquet
samples_per_shard: 16          # the unit of commit; 64 or more for large datasets
model:
  id: picturebook              # the embedded model; or a hub id, or a folder
low_res:
  steps: 30                    # denoising steps of the base image
captions:
  model: picturebook           # writes a caption for every view
upscale:
  method: resmaster            # which method enlarges; each has keys of its own
  scale: 4                     # 128 px -> 512 px
quality:
  clip: picturebook            # judges images and captions; null for none
"""

HEAD = f"""\
# Configuration

A dataset is described by one YAML file. Only `name` and one of `prompts` and `images` are needed. The last two can
also be given to the command (`resmaster run CONFIG --prompts FILE`), and `--set KEY=VALUE` sets
[any key there](command-line.md#settings-on-the-command-line). Every other key has a default. An unknown key is
an error that lists the known ones.

```yaml
{EXAMPLE}```

Keys marked with ° change no result: they say how fast or where a result is computed. Keys marked with † are read when
the dataset is published: they change no result of a stage. All other keys are part of a stage's identity. When such a
key changes, the stages that depend on it are done anew, and all others are kept.
`name`, `seed`, `replicas`, `samples_per_shard`, the kind of source and the size of `low_res` fix which samples there
are. They cannot change under a dataset that exists.

The page is made from the fields' docstrings by `python docs/configuration.py`.
"""

SECTIONS: tuple[tuple[str, type[Part]], ...] = (
    ("model", ModelConfig),
    ("low_res", LowResConfig),
    ("captions", CaptionsConfig),
)
"""The parts that stand before `upscale`."""

SECTIONS_AFTER: tuple[tuple[str, type[Part]], ...] = (
    ("quality", QualityConfig),
    ("recaption", RecaptionConfig),
    ("dispatch", DispatchConfig),
)


def page() -> str:
    """The whole page."""
    return "\n".join(_blocks()).rstrip() + "\n"


def _blocks() -> Iterator[str]:
    yield HEAD
    yield _section("The dataset", DatasetConfig.__doc__, _table(DatasetConfig, [*_scalars(DatasetConfig)]))
    for name, part in SECTIONS:
        yield _section(name, part.__doc__, _table(part))
    yield from _upscale()
    for name, part in SECTIONS_AFTER:
        yield _section(name, part.__doc__, _table(part))


def _upscale() -> Iterator[str]:
    """What all methods share, what several share, then each method."""
    known = methods()
    links = ", ".join(f"[{name}](#{name})" for name in known)
    first = plain_text(Method.__doc__).splitlines()[0]
    intro = f"{first} All methods have these keys. Without `method` it is `{DEFAULT}`."
    yield _section("upscale", f"{intro}\n\nMethods: {links}.", _table(Method))
    denoising = [name for name, method in known.items() if issubclass(method, Diffusion)]
    owners: dict[tuple[type[Part], str], list[str]] = {}
    for name, method in known.items():
        for field in method.model_fields:
            owners.setdefault((_owner(method, field), field), []).append(name)
    groups = {key: names for key, names in owners.items() if key[0] not in {*known.values(), Method}}
    rows = [
        (*row, "all that denoise" if names == denoising else ", ".join(names))
        for (owner, field), names in groups.items()
        for row in _rows(owner, [field])
    ]
    intro = "Settings that several methods have. The last column names the methods."
    yield _section("Shared settings of methods", intro, _as_table(rows, extra="methods"))
    yield _section("structure", _structure(), _table(StructureConfig))
    for name, method in known.items():
        yield _method(name, method)


def _structure() -> str:
    presets = _presets(STRUCTURE_PRESETS)
    return f"`upscale.structure`, of the methods that have it. {plain_text(StructureConfig.__doc__)}\n\n{presets}"


def _method(name: str, method: type[Method]) -> str:
    own = [field for field in get_annotations(method) if field in method.model_fields and field != "method"]
    also = [
        field for field in method.model_fields if field not in own and _owner(method, field) not in (method, Method)
    ]
    text = f"`method: {name}`. {plain_text(method.__doc__)}"
    if also:
        text += "\n\nShared settings: " + ", ".join(f"`{field}`" for field in also) + "."
    if any(method.presets.values()):
        text += f"\n\n{_presets(method.presets)}"
    return _section(name, text, _table(method, own) if own else "It has no settings of its own.\n")


def _presets(presets: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"- `preset: {name}`: {_settings(values)}" for name, values in presets.items()]
    return "Presets; a key that is given beside a preset wins:\n\n" + "\n".join(lines)


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}: {plain(value)}`" for name, value in values.items()) or "the defaults below"


def _section(title: str, text: str | None, table: str) -> str:
    return f"## {title}\n\n{plain_text(text)}\n\n{table}"


def _table(part: type[Part], fields: list[str] | None = None) -> str:
    return _as_table(_rows(part, fields or list(part.model_fields)))


def _as_table(rows: list[tuple[str, ...]], extra: str = "") -> str:
    head = ("key", "type", "default", "meaning", *([extra] if extra else []))
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _rows(part: type[Part], fields: list[str], prefix: str = "") -> list[tuple[str, ...]]:
    """The rows of a part's fields; those of a part inside it follow with dotted keys."""
    rows: list[tuple[str, ...]] = []
    for name in fields:
        field = part.model_fields[name]
        marks = field.json_schema_extra
        kinds = marks if isinstance(marks, dict) else {}
        mark = "°" if kinds.get("operational") else "†" if kinds.get("publication") else ""
        inner = part_in(field)
        kind = kind_of(field)
        if inner is StructureConfig:
            kind = "[structure](#structure)"
        rows.append((f"`{prefix}{name}`{mark}", kind, default_of(field), plain_text(field.description)))
        if inner not in (None, StructureConfig):
            rows += _rows(inner, list(inner.model_fields), f"{prefix}{name}.")
    return rows


def _scalars(part: type[Part]) -> Iterator[str]:
    """The fields that are no parts."""
    for name, field in part.model_fields.items():
        if part_in(field) is None:
            yield name


def _owner(method: type[Method], field: str) -> type[Part]:
    """The class, of the method's and those below it, that declares the field as the method has it."""
    return next(each for each in method.__mro__ if issubclass(each, Part) and field in get_annotations(each))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
