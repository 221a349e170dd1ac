"""Pushes a published dataset to a dataset repository of the Hugging Face hub, and goes on where an earlier push ended.

Invariants:
- Only files that records name are sent. Each is checked against its sha256 before it is sent, and what was sent is
  checked once more.
- Files that the repository has already, by sha256 and size, are not sent again.
- Several commits bring the objects. The last commit brings what leads readers to them (manifest, index, card), and
  takes away objects that the dataset does not lead to any more. It is made only if the repository's listing shows every
  object. So readers never follow a card to a file that is not there.
- Only files under this project's own names are deleted or replaced.
- The token is read by huggingface_hub, and is in no message. This module draws no progress: it sends events.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from resmaster_stages.dataset import layout
from resmaster_stages.dataset.commit import StoredObject, described
from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.dataset.reading import fetch
from resmaster_stages.errors import ShardError, UserError
from resmaster_stages.progress import Event, Note, emit
from resmaster_stages.publish.hub_errors import NO_TOKEN, again, told
from resmaster_stages.publish.shared import SETTINGS, shared
from resmaster_stages.redaction import one_line, without_credentials
from resmaster_stages.storage.scratch import scratch_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import CommitOperation

SCHEME = "hf://"
MAIN = "main"
FILES_PER_COMMIT = 100
"""The hub recommends at most so many files, and allows some 100 commits an hour."""
BYTES_PER_COMMIT = 20 << 30
"""After so many bytes a commit is made, so that a push that is broken off keeps them."""
FILES_TOGETHER, BYTES_TOGETHER = 16, 1 << 30
"""So much is sent at a time. From a remote store, as much lies in the scratch folder."""
WHOLE_BYTES = 16 << 20
"""Smaller files are held in memory. The hub keeps larger ones, of whatever kind, outside of git."""
CONNECT_SECONDS, ANSWER_SECONDS = 30.0, 300.0
"""How long to wait for a connection, and for the next byte. By default the client would wait for ever."""
LONGEST_CARD_BYTES = 1 << 20
LOGS = ("huggingface_hub", "httpx2", "httpcore2")
"""The logs that may hold addresses of requests."""

_HEADER = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
_NOT_KEPT = ("dataset_info", "train-eval-index")
"""Fields of the header that describe what the repository held before."""


@dataclass(frozen=True)
class Repository:
    """A dataset repository, and the branch to push to."""

    id: str
    branch: str = MAIN

    @property
    def url(self) -> str:
        """As `resmaster publish --to` takes it."""
        return f"{SCHEME}datasets/{self.id}" + (f"@{self.branch}" if self.branch != MAIN else "")


@dataclass(frozen=True)
class Sent(Event):
    """So many files were sent."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Committed(Event):
    """A commit with so many files was made. `left`: files that are still to come."""

    files: int
    left: int


@dataclass(frozen=True)
class Push:
    """What a push has to do."""

    repository: Repository
    objects: tuple[StoredObject, ...]
    """Every object that the repository will hold."""
    objects_due: tuple[StoredObject, ...]
    """Those that are not there yet."""
    entries_due: tuple[StoredObject, ...]
    """What leads readers to the objects, and is not there yet."""
    texts: Mapping[str, bytes]
    """Name -> content of the entries that the dataset does not hold in this form."""
    there: tuple[StoredObject, ...]
    """Files that are there already."""
    deleted: tuple[str, ...]
    """Files of earlier pushes that the dataset does not lead to any more."""
    exists: bool
    """Whether the repository exists."""
    unseen: str = ""
    """Why the repository could not be looked at."""

    @property
    def due(self) -> tuple[StoredObject, ...]:
        """All that is to be sent."""
        return self.objects_due + self.entries_due


def repository_of(url: str) -> Repository:
    """The repository that `hf://datasets/NAMESPACE/NAME` or `...@BRANCH` names. Raises UserError for anything else."""
    shown = without_credentials(url)
    if not url.startswith(SCHEME):
        raise UserError(
            f"--to {shown}: give hf://datasets/NAMESPACE/NAME; for files in a folder or another format use "
            "resmaster export, and to copy the dataset as it is copy its folder"
        )
    if url.startswith(f"{SCHEME}buckets/"):
        raise UserError(
            f"--to {shown}: a bucket is no dataset repository; it is reached through S3, as the root of a build "
            "(docs/sharing.md says how)"
        )
    from huggingface_hub.errors import HfUriError
    from huggingface_hub.utils import parse_hf_uri

    try:
        found = parse_hf_uri(url)
    except HfUriError as error:
        raise UserError(f"--to {shown}: {one_line(error.msg)} Give hf://datasets/NAMESPACE/NAME") from error
    if found.type != "dataset" or found.path_in_repo:
        raise UserError(f"--to {shown}: give a whole dataset repository: hf://datasets/NAMESPACE/NAME")
    return Repository(found.id, found.revision or MAIN)


def require_token() -> None:
    """Raise UserError if nobody is logged in to the hub."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(NO_TOKEN)


def compare(dataset: Dataset, repository: Repository, *, lenient: bool = False) -> Push:
    """What is to be done so that the repository holds the published dataset. Changes nothing.

    lenient: if the repository cannot be looked at, everything is to be sent, and the result says why.
    Raises PlanError if the dataset is not published, and UserError if the repository holds another dataset.
    """
    files = shared(dataset)
    api, unseen = _api(), ""
    found: dict[str, Any] | None = {}
    kept: dict[str, Any] = {}
    try:
        with _heard(), told(repository.url):
            found = _listing(api, repository)
            kept = _kept_fields(api, repository, found or {}, dataset.config.name)
    except (ConnectionError, UserError) as error:
        if not lenient or isinstance(error, AnotherDataset):
            raise
        unseen = str(error)
    texts = {SETTINGS: files.settings, layout.CARD: _with_fields(dataset.folder.read(layout.CARD), kept)}
    entries = [file for file in files.entries if file.name not in texts]
    entries += [described(name, text) for name, text in texts.items()]
    listed = found or {}

    def is_there(file: StoredObject) -> bool:
        return _same(listed.get(file.name), file, dataset, texts)

    objects_due = tuple(file for file in files.objects if not is_there(file))
    entries_due = tuple(file for file in entries if not is_there(file))
    due = {file.name for file in (*objects_due, *entries_due)}
    wanted = {file.name for file in (*files.objects, *entries)}
    return Push(
        repository=repository,
        objects=files.objects,
        objects_due=objects_due,
        entries_due=entries_due,
        texts=texts,
        there=tuple(file for file in (*files.objects, *entries) if file.name not in due),
        deleted=tuple(sorted(name for name in listed if _is_ours(name) and name not in wanted)),
        exists=found is not None,
        unseen=unseen,
    )


def push(dataset: Dataset, work: Push, *, public: bool = False) -> str:
    """Do what `compare` found, and return the address of the repository. A repository that does not exist is made.

    Raises ShardError if an object of the dataset is gone or damaged; then the repository leads to no object that it
    does not hold.
    """
    api, repository = _api(), work.repository
    with _heard(), told(repository.url):
        if not work.exists:
            _create(api, repository, public)
        deleted = work.deleted
        if last := _send_objects(api, dataset, work):
            listed = _listing(api, repository, last) or {}
            _require_all(work, listed, dataset)
            deleted = tuple(name for name in deleted if name in listed)
        if work.entries_due or deleted:
            additions = _sent(api, dataset, work, work.entries_due)
            _commit(api, work, [*additions, *map(_deletion, deleted)], f"Publish {dataset.config.name}")
            emit(Committed(len(work.entries_due), 0))
    return f"{api.endpoint}/datasets/{repository.id}"


def _create(api: HfApi, repository: Repository, public: bool) -> None:
    if repository.branch != MAIN:
        raise UserError(f"{repository.url}: the repository is not there yet; push to it without @BRANCH first")
    again(lambda: api.create_repo(repository.id, repo_type="dataset", private=not public, exist_ok=True))


def _send_objects(api: HfApi, dataset: Dataset, work: Push) -> str:
    """Send the objects that are due, in several commits. Returns the id of the last commit, if there was one."""
    last, left = "", len(work.due)
    for batch in _portions(work.objects_due, FILES_PER_COMMIT, BYTES_PER_COMMIT):
        additions: list[CommitOperationAdd] = []
        for files in _portions(batch, FILES_TOGETHER, BYTES_TOGETHER):
            additions += _sent(api, dataset, work, files)
        left -= len(batch)
        last = _commit(api, work, additions, f"Add {len(batch)} files of {dataset.config.name}")
        emit(Committed(len(batch), left))
    return last


# ----------------------------------------------------------------------------------------------------------------------
# what is there


class AnotherDataset(UserError):
    """The repository holds another dataset."""


def _listing(api: HfApi, repository: Repository, commit: str = "") -> dict[str, Any] | None:
    """Name -> file of the repository as its branch, or a commit, has it. None if the repository does not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = api.list_repo_tree(
            repository.id, repo_type="dataset", revision=commit or repository.branch, recursive=True
        )
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    except RepositoryNotFoundError:
        return None


def _same(listed: Any, file: StoredObject, dataset: Dataset, texts: Mapping[str, bytes]) -> bool:
    """Whether a file of the repository (None if there is none) has the content of `file`."""
    if listed is None or listed.size != file.bytes:
        return False
    if listed.lfs is not None:
        return bool(listed.lfs.sha256 == file.sha256)
    content = texts[file.name] if file.name in texts else dataset.folder.read(file.name)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)  # what git calls the file
    return bool(listed.blob_id == blob.hexdigest())


def _is_ours(name: str) -> bool:
    """Whether only a push of this project gives a file this name."""
    own = (layout.CURATION_TABLE, layout.CURATED_INDEX)
    return layout.object_of(name) is not None or layout.is_curated(name) or name in own


def _require_all(work: Push, listed: Mapping[str, Any], dataset: Dataset) -> None:
    """Raise UserError if the repository does not hold every object."""
    missing = [file.name for file in work.objects if not _same(listed.get(file.name), file, dataset, work.texts)]
    if missing:
        raise UserError(
            f"{work.repository.url}: {len(missing)} files were sent and are not there, {missing[0]} first; does a "
            ".gitignore there name them, or does another push work on it? Mend that, then run the same command again"
        )


def _kept_fields(api: HfApi, repository: Repository, listed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of the header of the card that is there. Raises AnotherDataset if it is not of the dataset `name`."""
    settings = _text(api, repository, listed, SETTINGS)
    if settings is not None:
        values = _mapping(settings)
        if "name" in values and values["name"] != name:
            raise AnotherDataset(
                f"{repository.url}: holds the dataset {str(values['name'])!r}, which a push of {name!r} would replace; "
                "choose another repository, or delete its config.yaml"
            )
    header = _HEADER.match(_text(api, repository, listed, layout.CARD) or "")
    return _mapping(header[1]) if header else {}


def _text(api: HfApi, repository: Repository, listed: Mapping[str, Any], name: str) -> str | None:
    """A small text of the repository; None if it is not there, or is no such text."""
    if name not in listed or listed[name].size > LONGEST_CARD_BYTES:
        return None
    with scratch_folder() as scratch:
        path = api.hf_hub_download(
            repository.id, name, repo_type="dataset", revision=repository.branch, local_dir=scratch
        )
        return Path(path).read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")


def _mapping(text: str) -> dict[str, Any]:
    """The values of YAML; empty if it cannot be read."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in values.items() if isinstance(name, str)} if isinstance(values, dict) else {}


def _with_fields(card: bytes, fields: Mapping[str, Any]) -> bytes:
    """A card with those of `fields` in its header that it does not state itself, such as the publisher's licence."""
    text = card.decode()
    found = _HEADER.match(text)
    own = _mapping(found[1]) if found else {}
    more = {name: value for name, value in fields.items() if name not in own and name not in _NOT_KEPT}
    if found is None or not more:
        return card
    return f"---\n{found[1]}{yaml.safe_dump(more, sort_keys=False)}---\n{text[found.end() :]}".encode()


# ----------------------------------------------------------------------------------------------------------------------
# sending


def _sent(api: HfApi, dataset: Dataset, work: Push, files: Sequence[StoredObject]) -> list[CommitOperationAdd]:
    """Send some files, so that a commit can name them."""
    from huggingface_hub import CommitOperationAdd

    _limit_waits()
    with scratch_folder() as scratch:
        additions = [CommitOperationAdd(file.name, _content(dataset, work.texts, file, scratch)) for file in files]
        api.preupload_lfs_files(work.repository.id, additions, repo_type="dataset", revision=work.repository.branch)
        for file, addition in zip(files, additions, strict=True):
            if addition.upload_info.sha256.hex() != file.sha256:
                raise ShardError(f"{file.name}: changed while it was sent; run the same command again")
    emit(Sent(len(files), sum(file.bytes for file in files)))
    return additions


def _content(dataset: Dataset, texts: Mapping[str, bytes], file: StoredObject, scratch: Path) -> bytes | Path:
    """The content of a file, checked against its record."""
    if file.name in texts:
        return texts[file.name]
    path = fetch(dataset, file, scratch)
    return path.read_bytes() if file.bytes < WHOLE_BYTES else path


def _deletion(name: str) -> CommitOperationDelete:
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(name, is_folder=False)


def _commit(api: HfApi, work: Push, operations: Sequence[CommitOperation], message: str) -> str:
    """Make a commit, and return its id."""
    _limit_waits()
    with warnings.catch_warnings(record=True) as remarks:
        made = again(
            lambda: api.create_commit(
                work.repository.id,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=work.repository.branch,
            )
        )
    for remark in remarks:
        emit(Note(one_line(remark.message)))
    return made.oid


def _portions(files: Sequence[StoredObject], longest: int, most_bytes: int) -> Iterator[Sequence[StoredObject]]:
    """`files` in pieces of at most `longest` files and `most_bytes` bytes, or of one larger file."""
    piece: list[StoredObject] = []
    size = 0
    for file in files:
        if piece and (len(piece) == longest or size + file.bytes > most_bytes):
            yield piece
            piece, size = [], 0
        piece.append(file)
        size += file.bytes
    if piece:
        yield piece


# ----------------------------------------------------------------------------------------------------------------------
# the client


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="resmaster-pipeline")


def _limit_waits() -> None:
    """Let no upload and no commit wait for ever, as they would by default. The client's listings always do."""
    import httpx2
    from huggingface_hub.utils import get_session

    get_session().timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)


class _Waits(logging.Handler):
    """Turns the client's log into notes: those that say how long it waits. The others hold signed addresses."""

    def __init__(self) -> None:
        super().__init__()
        self._context = copy_context()

    def emit(self, record: logging.LogRecord) -> None:
        """Note a line of the log. The client's threads do not have the listeners of the push, so they come along."""
        line = record.getMessage()
        if line.startswith("Rate limited."):
            self._context.copy().run(emit, Note(f"the hub: {one_line(line)}"))


@contextmanager
def _heard() -> Iterator[None]:
    """Within the block, the client draws no bars, and what its log says about waiting becomes notes. The other lines of
    its log, and of its libraries', go nowhere."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logs = [logging.getLogger(name) for name in LOGS]
    before = [(log.handlers[:], log.propagate) for log in logs]
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    for log in logs:
        log.handlers[:], log.propagate = [_Waits()], False
    try:
        yield
    finally:
        for log, (handlers, propagate) in zip(logs, before, strict=True):
            log.handlers[:], log.propagate = handlers, propagate
        if not quiet:
            enable_progress_bars()
