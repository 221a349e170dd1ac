"""Creates, finds and opens datasets: a dataset is a folder with a configuration, a plan and commits.

This module loads no model and reads no objects of stages.

Invariants:
- `config.json` is written once. The fields that fix keys and their order never change. The configuration of stages may
  change: each change is appended as `configs/0001.json`, `configs/0002.json`, ..., and the last one counts. Fields made
  by `config.part.LaterOn` change only if they are set.
- No credential is ever written. A configuration that holds one is refused, and any that remain are cut out of URLs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resmaster_stages.config.dataset import DatasetConfig
from resmaster_stages.config.load import parse_config
from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commits import Commits
from resmaster_stages.dataset.plan import Plan, read_plan
from resmaster_stages.dataset.records import signed, unsigned
from resmaster_stages.dataset.redo import Redos, read_redos
from resmaster_stages.dataset.stages import stage_hashes
from resmaster_stages.errors import ConfigError, PlanError, UserError
from resmaster_stages.redaction import one_line, without_credentials
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.probe import require_one_winner
from resmaster_stages.storage.store_errors import is_damage

RACES = 20
"""How often an append is tried again with the next number after another process has won."""


@dataclass(frozen=True)
class Dataset:
    """An existing dataset: its folder and its current configuration."""

    folder: Folder
    config: DatasetConfig

    @property
    def url(self) -> str:
        """The dataset's folder or URL, as `open_dataset` takes it."""
        return self.folder.url

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Stage -> identity of its result, for the stages that the dataset needs, in pipeline order."""
        return stage_hashes(self.config)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the samples, read at the first use and then kept.

        Raises PlanError if there is no plan.
        """
        return read_plan(self.folder)

    @cached_property
    def redos(self) -> Redos:
        """The requests to make samples again, read at the first use and then kept.

        Raises PlanError if one cannot be read.
        """
        return read_redos(self.folder)

    def commits(self, stage: str) -> Commits:
        """The commits of a stage. Raises PlanError for a stage that the dataset does not need."""
        if stage not in self.hashes:
            raise PlanError(
                f"{self.url}: this configuration needs no stage {stage!r}; it needs {', '.join(self.hashes)}"
            )
        return Commits(self.folder, stage, self.hashes[stage])


def create_or_open(config: DatasetConfig, found: Dataset | None = None) -> Dataset:
    """The dataset that `config` names. It is created if it does not exist.

    found: the result of `find_dataset`, if known. If `config` changes nothing in it, it is returned without reading.

    Raises ConfigError if `config` contradicts the existing dataset. Raises UserError if the root cannot be used, or if
    its store lets two writers create the same name and the configuration does not allow that.
    """
    root = open_root(config.root)
    folder = root.sub(config.name)
    config = config.model_copy(update={"root": root.url})
    with _usable(config.root):
        if not config.allow_overwriting_store:
            require_one_winner(folder)
        if found and _dump(found.config) == _dump(config.keeping(found.config)):
            return found
        with suppress(FileExistsError):
            folder.create(layout.CONFIG, _dump(config))
        return _adopt(folder, config)


def find_dataset(config: DatasetConfig) -> Dataset | None:
    """The dataset that `config` names, with its current (last) configuration, or None. Writes nothing.

    Raises ConfigError if `config` contradicts the existing dataset, and UserError if the root cannot be used.
    """
    folder = open_root(config.root).sub(config.name)
    with _usable(config.root):
        if not _has_config(folder):
            return None
        stored = _current(folder)[1]
        _check_plan_identity(folder, stored, config)
    return Dataset(folder, stored)


def planned_dataset(config: DatasetConfig) -> Dataset:
    """The dataset that `config` names, which must exist. `config` becomes its configuration; its input is not read.

    Raises ConfigError if `config` contradicts the existing dataset, and PlanError if the dataset does not exist.
    """
    root = open_root(config.root)
    folder = root.sub(config.name)
    with _usable(config.root):
        if not _has_config(folder):
            raise PlanError(f"{folder.url}: has no plan yet; start with: resmaster run CONFIG")
        return _adopt(folder, config.model_copy(update={"root": root.url}))


def open_dataset(url: str) -> Dataset:
    """The dataset at `url`, with its current (last) configuration. `url`: its folder, or a root with just one dataset.

    Raises ConfigError if there is no dataset, if there are several, or if its configuration is damaged.
    """
    folder = open_root(url)
    if not _has_config(folder):
        below = datasets_below(folder)
        if not below:
            raise ConfigError(f"{folder.url}: {no_dataset(folder.names(''))}")
        if len(below) > 1:
            raise ConfigError(f"{folder.url}: several datasets here ({', '.join(below)}); name one: {folder.url}/NAME")
        folder = folder.sub(below[0])
    return dataset_in(folder)


def dataset_in(folder: Folder) -> Dataset:
    """The dataset in a folder that holds `config.json`. Raises ConfigError if its configuration is damaged."""
    return Dataset(folder, _current(folder)[1])


def datasets_below(folder: Folder) -> list[str]:
    """The names of the datasets directly in a folder."""
    return [name for name in folder.names("") if _has_config(folder.sub(name))]


def dataset_or_root(url: str) -> Dataset | Folder:
    """The dataset at `url`; if there is none, the folder, below which datasets may lie or be made.

    Raises ConfigError if it is a damaged dataset, and if it is a path of this machine at which nothing is.
    """
    folder = open_root(url)
    names = folder.names("")
    if layout.CONFIG in names:
        return dataset_in(folder)
    if layout.PLAN in names or layout.COMMITS in names or (folder.local and not folder.exists("")):
        raise ConfigError(f"{folder.url}: {no_dataset(names)}")
    return folder


def _has_config(folder: Folder) -> bool:
    return folder.exists(layout.CONFIG)


def no_dataset(names: Collection[str]) -> str:
    """Why no dataset can be opened in a folder without `config.json`, and what to do. names: what is in the folder."""
    if layout.PLAN in names or layout.COMMITS in names:
        return "config.json is gone; restore it from a copy, or run the same configuration again: resmaster run CONFIG"
    return "no dataset here (no config.json); make one with: resmaster run CONFIG"


def _adopt(folder: Folder, config: DatasetConfig) -> Dataset:
    """Open the existing dataset, and append `config` as its current configuration if it differs."""
    for _ in range(RACES):
        number, stored = _current(folder)
        _check_plan_identity(folder, stored, config)
        config = config.keeping(stored)
        text = _dump(config)
        if _dump(stored) == text:
            return Dataset(folder, config)
        try:
            folder.create(layout.changed_config(number + 1), text)
        except FileExistsError:
            continue
        return Dataset(folder, config)
    raise ConfigError(f"{folder.url}: other processes keep changing the configuration; run one at a time")


def _check_plan_identity(folder: Folder, stored: DatasetConfig, config: DatasetConfig) -> None:
    was, now = stored.plan_identity(), config.plan_identity()
    for name, old in was.items():
        if now[name] != old:
            place = f"low_res.{name}" if name in ("height", "width") else name
            raise ConfigError(
                f"{folder.url}: {place} is {old!r} there and {now[name]!r} in the configuration; it fixes the samples' "
                f"keys and order: set it back, or choose another name or root"
            )


def current_config(folder: Folder) -> str:
    """Name of the file that holds the current (last) configuration."""
    number = _current_number(folder)
    return layout.changed_config(number) if number else layout.CONFIG


def _current_number(folder: Folder) -> int:
    numbers = [layout.number_of(name) for name in folder.names(layout.CONFIGS)]
    return max((found for found in numbers if found is not None), default=0)


def _current(folder: Folder) -> tuple[int, DatasetConfig]:
    """Number and content of the current (last) configuration.

    The folder of a copy may have another name than the dataset. Raises ConfigError if the configuration is damaged.
    """
    number = _current_number(folder)
    name = layout.changed_config(number) if number else layout.CONFIG
    place = without_credentials(folder.url_of(name))
    try:
        values = config_values(folder.read(name))
    except (ValueError, OSError, UserError) as error:
        # a name that is listed, and is not found, is that of a link to nothing
        if not isinstance(error, (ValueError, FileNotFoundError)) and not is_damage(error):
            raise
        raise ConfigError(
            f"{place}: damaged ({error}); restore it, or delete it and run the same configuration again"
        ) from error
    config = parse_config({**DatasetConfig.before(), **values}, place)
    parent = folder.path.rpartition("/")[0]
    return number, config.model_copy(update={"root": Folder(folder.fs, parent).url})


def config_values(text: bytes) -> dict[str, Any]:
    """The values in the file of a configuration. Raises ValueError if the file is damaged."""
    try:
        values = json.loads(unsigned(text))
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error
    if not isinstance(values, dict) or "name" not in values:
        raise ValueError("it holds no configuration")
    return values


def _dump(config: DatasetConfig) -> bytes:
    """A configuration as canonical, indented JSON without credentials."""
    return signed(_clean(config.model_dump(mode="json")), indent=2)


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(inner) for name, inner in value.items()}
    return without_credentials(value) if isinstance(value, str) else value


@contextmanager
def _usable(root: str) -> Iterator[None]:
    """Turn errors about a missing or unreachable root into UserError, at the start of a run."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        message = "no such bucket or folder; create it, or choose another root"
        raise UserError(f"{without_credentials(root)}: {message}") from error
    except OSError as error:
        place, reason = without_credentials(root), one_line(error)
        if not reason.startswith(place):
            reason = f"{place}: cannot be used ({reason}); mend that"
        raise UserError(f"{reason}, or choose another root") from error
