"""A folder on a local disk or in an object store, through fsspec. All differences between the two are in this module.

Invariants:
- A final name never holds a half-written file. Local files are written under a temporary name, synced and renamed;
  object stores make an object visible only when it is complete.
- `create` succeeds for exactly one of any number of racing writers, if the store honours conditional creates (`probe`
  tests that).
- Listings are never cached, so another worker's commit is seen at once.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from glob import has_magic
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.redaction import holds_credentials, one_line, printable, without_credentials
from resmaster_stages.storage.store_errors import (
    NotRegular,
    explained,
    is_damaged_answer,
    is_unreadable,
    store_code,
    worth_repeating,
)

CREATE_ATTEMPTS = 6
"""How often a conditional create is sent while the store answers that another create of the name is under way."""

S3_ATTEMPTS = 8
"""How often botocore sends a request. In addition, s3fs repeats interrupted answers up to five times."""

PART_BYTES = 8 << 20
"""Larger files are uploaded to S3 in parts of this size, ten at a time, so an upload takes some 80 MiB of memory."""
PARTS = 10_000
"""Maximum number of parts on S3. Files beyond 80 GB are uploaded in larger parts."""

_memory_lock = threading.Lock()  # fsspec's memory store checks and writes in two steps


def is_outside(name: str) -> bool:
    """Whether a name, relative to a folder, is that of a file outside the folder."""
    return name.startswith("/") or ".." in name.split("/")


_MODIFIED = ("LastModified", "mtime", "created")  # the names in S3, local and in-memory listings


@dataclass(frozen=True)
class Listed:
    """A file as a listing shows it."""

    name: str
    bytes: int
    modified: datetime
    """Time of the last write by the store's clock, in UTC."""


@dataclass(frozen=True)
class Folder:
    """A folder of a file system. Names are relative to it, with forward slashes.

    Missing files raise FileNotFoundError; errors that no retry can mend raise UserError.
    """

    fs: Any
    """The fsspec file system."""
    path: str
    """Absolute path (or bucket and prefix) in the file system's own notation, without a trailing slash."""

    @property
    def local(self) -> bool:
        """Whether the folder is on this machine's disk."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def _in_memory(self) -> bool:
        """Whether the folder is in fsspec's memory store. There, all readers of a file share one read position, so
        files are read whole."""
        return isinstance(self.fs, MemoryFileSystem)

    @property
    def _on_s3(self) -> bool:
        protocol = self.fs.protocol
        return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)

    @property
    def _whole(self) -> dict[str, Any]:
        """Options that make a read take one request. By default s3fs first asks for the size, and lists the folder if
        the file does not exist."""
        return {"max_concurrency": 1} if self._on_s3 else {}

    @property
    def url(self) -> str:
        """The URL of the folder, as `open_root` takes it; a plain path if local."""
        return self.path if self.local else str(self.fs.unstrip_protocol(self.path))

    def full(self, name: str) -> str:
        """The full path of a file in the folder. Raises UserError for a name that leads out of the folder."""
        if is_outside(name):  # names come from records, which may be foreign
            raise UserError(
                f"{self.url}: the name {name!r} leads out of this folder; the record that holds it is not ours"
            )
        return f"{self.path}/{name}" if name else self.path

    def sub(self, name: str) -> Folder:
        """The sub-folder `name`."""
        return Folder(self.fs, self.full(name))

    def url_of(self, name: str) -> str:
        """The URL (a plain path if local) of a file in the folder."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a file."""
        with explained(self.url_of(name)):
            return self._cat(self.full(name))

    def _cat(self, path: str) -> bytes:
        if self.local:
            require_regular(path)
        content: bytes = self.fs.cat_file(path, **self._whole)
        return content

    def read_many(self, names: list[str], lenient: bool = False) -> dict[str, bytes]:
        """Name -> content of several files, read in parallel if the store allows it. Missing files are left out.

        lenient: so are files that cannot be read, if that concerns these files alone (`is_unreadable`).
        """
        if not names:
            return {}
        by_path = {self.full(name): name for name in names}
        with explained(self.url):
            if self.local:
                found = {path: self._content_or_error(path) for path in by_path}
            else:
                answers = self.fs.cat_ranges(list(by_path), None, None, on_error="return", **self._whole)
                found = dict(zip(by_path, answers))
        result: dict[str, bytes] = {}
        for path, name in by_path.items():
            value = found[path]
            if isinstance(value, Exception):
                try:
                    with explained(self.url_of(name)):
                        raise value
                except FileNotFoundError:
                    continue
                except (OSError, UserError) as error:
                    if not (lenient and is_unreadable(error)):
                        raise
            else:
                result[name] = value
        return result

    def _content_or_error(self, path: str) -> bytes | Exception:
        try:
            return self._cat(path)
        except Exception as error:
            return error

    def open(self, name: str, ahead_bytes: int = 64 * 1024) -> IO[bytes]:
        """Open a file for random reads. From a remote store, at least `ahead_bytes` are fetched at a time.

        Reads of the file raise the errors of the store's library, so they belong into `explained`.
        """
        with explained(self.url_of(name)):
            if self._in_memory:
                return io.BytesIO(self.read(name))
            if self.local:
                require_regular(self.full(name))
            options = {} if self.local else {"block_size": ahead_bytes, "cache_type": "readahead"}
            return self.fs.open(self.full(name), "rb", **options)

    def read_part(self, name: str, offset: int, size: int) -> bytes:
        """At most `size` bytes of a user's file from byte `offset` on. Raises OSError if a local file cannot be read or
        is no regular file. Errors of a store are raised as by `read`."""
        if self.local:
            with open_regular(self.full(name)) as file:
                file.seek(offset)
                return file.read(max(0, min(size, os.fstat(file.fileno()).st_size - offset)))
        if not size:
            return b""
        with explained(self.url_of(name)):
            try:
                return self.fs.cat_file(self.full(name), start=offset, end=offset + size, **self._whole)
            except OSError as error:
                if store_code(error) in ("InvalidRange", "416"):  # the file is empty, or ends before `offset`
                    return b""
                raise

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of a file in pieces of `size` bytes (the last may be shorter). Few pieces are held at a time."""
        with explained(self.url_of(name)), self.open(name, max(size, PART_BYTES)) as file:
            while piece := file.read(size):
                yield piece

    def exists(self, name: str) -> bool:
        """Whether the file or folder exists now."""
        path = self.full(name)
        with explained(self.url_of(name)):
            return self._exists_on_s3(path) if self._on_s3 else bool(self.fs.exists(path))

    def _exists_on_s3(self, path: str) -> bool:
        """Whether an object has this name, or lies below it. A refused listing says why, a refused HEAD does not."""
        bucket, _, key = path.partition("/")
        for prefix in (key, f"{key}/"):  # other names that begin with `key` may come before those of the folder
            page = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, **self.fs.req_kw)
            first = next((each["Key"] for each in page.get("Contents", [])), "")
            if not key or first == key or first.startswith(f"{key}/"):
                return True
        return False

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if it does not exist."""
        with explained(self.url_of(name)):
            try:
                return int(self.fs.size(self.full(name)))
            except OSError as error:
                if isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP:
                    return None
                raise

    def names(self, folder: str) -> list[str]:
        """Sorted names (relative to this folder) of files and folders directly in `folder`; empty if it is missing."""
        with explained(self.url_of(folder)):
            if self._on_s3:
                found = [path for path, _ in self._listed(folder, "/")]
            else:
                try:
                    found = self.fs.ls(self.full(folder), detail=False, refresh=True)
                except TypeError:
                    found = self.fs.ls(self.full(folder), detail=False)
                except FileNotFoundError:
                    return []
        prefix = f"{folder}/" if folder else ""
        paths = {str(path).rstrip("/") for path in found} - {self.full(folder)}  # some stores list the folder itself
        return sorted(prefix + path.rsplit("/", 1)[-1] for path in paths)

    def files(self, folder: str = "", whatever: bool = False) -> Iterator[Listed]:
        """Every file below a sub-folder ("": this folder) at any depth, hidden files too. On a disk and on S3, few
        entries are held at a time.

        whatever: also what has the name of a file on a disk and is none: links, pipes, folders.
        """
        start = self.full(folder)
        with explained(self.url_of(folder)):
            if self._on_s3:
                found = self._listed(folder)
            elif self.local:
                found = _walk(start, whatever)
            else:
                found = self.fs.find(start, detail=True).items()
            for path, facts in found:
                # some stores list folders among the files
                if path.startswith(f"{start}/") and not path.endswith("/") and facts.get("type", "file") == "file":
                    moment = next((facts[name] for name in _MODIFIED if facts.get(name) is not None), None)
                    if isinstance(moment, (int, float)):
                        moment = _moment(moment)
                    moment = moment or self.fs.modified(path)
                    yield Listed(path[len(self.path) + 1 :], int(facts["size"]), moment.astimezone(UTC))

    def _listed(self, folder: str, delimiter: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """(path, facts) of everything below `folder` on S3, a page at a time. delimiter "/": only directly in `folder`.

        s3fs itself would hold a kilobyte per entry, and would also list the parent of a missing folder.
        """
        bucket, _, prefix = self.full(folder).partition("/")
        asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": delimiter, **self.fs.req_kw}
        while True:
            page = self.fs.call_s3("list_objects_v2", **asked)
            with _understood(self.url_of(folder)):
                found = [(f"{bucket}/{each['Prefix']}".rstrip("/"), _FOLDER) for each in page.get("CommonPrefixes", [])]
                for each in page.get("Contents", []):
                    facts = {"size": int(each["Size"]), "LastModified": each["LastModified"].astimezone(UTC)}
                    found.append((f"{bucket}/{each['Key']}", facts))
                more = _next(asked, page, {"ContinuationToken": "NextContinuationToken"})
            yield from found
            if not more:
                return
            asked |= more

    def unfinished_uploads(self) -> list[tuple[Listed, str]]:
        """(file that was to be written, upload id) of unfinished multi-part uploads below this folder. S3 only."""
        if not self._on_s3:
            return []
        bucket, _, prefix = self.path.partition("/")
        found: list[tuple[Listed, str]] = []
        asked = {"Bucket": bucket, "Prefix": f"{prefix}/"}
        with explained(self.url), _understood(self.url):
            while True:
                page = self.fs.call_s3("list_multipart_uploads", **asked)
                for upload in page.get("Uploads", []):
                    moment = upload["Initiated"].astimezone(UTC)
                    found.append((Listed(upload["Key"][len(prefix) + 1 :], 0, moment), upload["UploadId"]))
                more = _next(asked, page, {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"})
                if not more:
                    return found
                asked |= more

    def abort_upload(self, name: str, upload: str) -> None:
        """Abort an unfinished upload and delete its parts. An upload that is already gone is no error."""
        bucket, _, key = self.full(name).partition("/")
        with explained(self.url_of(name)):
            try:
                self.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
            except FileNotFoundError:
                return

    def modified(self, name: str) -> datetime:
        """When a file was last written, by the store's clock (UTC)."""
        with explained(self.url_of(name)), _understood(self.url_of(name)):
            if self.local:
                return _moment(os.stat(self.full(name)).st_mtime)
            moment: datetime = self.fs.modified(self.full(name))
            return moment.astimezone(UTC)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet. Of racing writers, all but one get FileExistsError."""
        with explained(self.url_of(name)):
            put_if_absent(self.fs, self.full(name), data)

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file. Readers see either the old or the new content, never a part."""
        path = self.full(name)
        with explained(self.url_of(name)):
            if self.local:
                _replace(path, data)
            else:
                self.fs.pipe_file(path, data)

    def write_many(self, files: dict[str, bytes]) -> None:
        """Write or replace several files, in parallel if the store allows it."""
        if self.local:
            for name, data in files.items():
                self.write(name, data)
        else:
            with explained(self.url):
                self.fs.pipe({self.full(name): data for name, data in files.items()})

    def upload(self, name: str, source: Path) -> None:
        """Copy a local file to a new name. The new file is visible only when it is complete."""
        path = self.full(name)
        with explained(self.url_of(name)):
            if self.local:
                _replace(path, source)
            elif self._on_s3:
                size = max(PART_BYTES, -(-source.stat().st_size // PARTS))
                self.fs.put_file(str(source), path, chunksize=size)
            else:
                self.fs.put_file(str(source), path)

    def download(self, name: str, scratch: Path, recorded: str = "") -> tuple[Path, str]:
        """(local path, sha256) of a file: the file itself if it is local, else a copy in the folder `scratch`.

        recorded: the sha256 that the file should have. A copy of another one is fetched once more, because it may have
        been damaged on its way.
        """
        with explained(self.url_of(name)):
            if self.local:
                target = Path(self.full(name))
                require_regular(str(target))
                return target, sha256_of(target)
            target = scratch / name.replace("/", "_")
            try:
                digest = self._fetch(name, target)
            except Exception as error:
                if not is_damaged_answer(error):
                    raise
                digest = ""
            if not digest or recorded not in ("", digest):
                digest = self._fetch(name, target)
            return target, digest

    def _fetch(self, name: str, target: Path) -> str:
        """Copy a file of a remote store. Returns the sha256 of the copy."""
        if self._in_memory:
            target.write_bytes(self.read(name))
        else:
            self.fs.get_file(self.full(name), str(target))
        return sha256_of(target)

    def remove(self, name: str) -> None:
        """Delete a file. A file that is already gone is no error."""
        with explained(self.url_of(name)):
            try:
                self.fs.rm_file(self.full(name))
            except FileNotFoundError:
                return

    def remove_all(self, folder: str) -> None:
        """Delete a folder with its content. A folder that is already gone is no error."""
        with explained(self.url_of(folder)):
            try:
                if self.local or not has_magic(self.full(folder)):
                    self.fs.rm(self.full(folder), recursive=True)
                    return
                for file in list(self.files(folder)):  # fsspec would take the name for a pattern
                    self.fs.rm_file(self.full(file.name))
            except FileNotFoundError:
                return


_FOLDER: dict[str, Any] = {"type": "directory"}


def _moment(seconds: float) -> datetime:
    """A file's time in UTC. A time that no calendar has, as broken clocks leave it, counts as the far future."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.max.replace(tzinfo=UTC)


@contextmanager
def _understood(place: str) -> Iterator[None]:
    """Turn what an answer without the parts that S3 promises raises into one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConnectionError(
            f"{place}: the answer is not that of an S3 store ({type(error).__name__}: {one_line(error)}); check the "
            "network and AWS_ENDPOINT_URL"
        ) from error


def _next(asked: dict[str, Any], page: dict[str, Any], markers: dict[str, str]) -> dict[str, Any]:
    """What to ask for the page after `page`; empty if `page` is the last. markers: name to ask with -> name in a page.
    Raises ValueError if the same page would come again, and KeyError if a marker is missing."""
    if not page.get("IsTruncated"):
        return {}
    more = {name: page[said] for name, said in markers.items()}
    if more.items() <= asked.items():
        raise ValueError("a listing that never ends")
    return more


def _walk(start: str, whatever: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, facts) of every regular file below a folder on this machine's disk. whatever: of all else, too."""
    for place, folders, names in os.walk(start):
        for name in [*names, *folders] if whatever else names:
            path = os.path.join(place, name)
            try:
                facts = os.lstat(path)
                if whatever and stat.S_ISLNK(facts.st_mode):
                    with suppress(OSError):  # a link to nothing
                        facts = os.stat(path)
            except FileNotFoundError:  # gone since the folder was listed
                continue
            if whatever or stat.S_ISREG(facts.st_mode):
                yield path, {"size": facts.st_size, "mtime": facts.st_mtime}


ROOTS: tuple[str, ...] = ("file", "s3")
"""Schemes of roots. The tests add `memory`, whose content is gone when the process ends."""


def open_root(url: str) -> Folder:
    """The folder at a path, a `file://` URL or `s3://bucket/prefix`, where datasets lie. It need not exist yet.

    Raises UserError for another scheme, a missing bucket name, credentials in the URL, wrong settings of S3, and a
    local path that is a file or cannot be looked at.
    """
    scheme = _scheme(url)
    if scheme and scheme not in ROOTS:
        raise UserError(
            f"{without_credentials(url)}: {scheme}:// cannot be a root; give a folder or s3://bucket/prefix"
        )
    parts = url.rstrip("/").split("/")[3:] if scheme == "s3" else []
    if {"", ".", ".."} & set(parts) or (parts and printable(url) != url):  # programs understand them in different ways
        raise UserError(
            f"{url}: has an empty part, a part . or .., or a control character; write s3://bucket/prefix without them"
        )
    return open_folder(url)


def open_folder(url: str) -> Folder:
    """The folder at a path or at any fsspec URL, where the user's input lies. Raises UserError as `open_root` does."""
    refuse_credentials(url)
    folder = _folder_at(url)
    if folder.local:
        with explained(url), suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.stat(folder.path or "/").st_mode):
                raise UserError(f"{url}: is a file; give a folder or a URL such as s3://bucket/prefix")
    return folder


def open_file(url: str) -> tuple[Folder, str]:
    """The folder and the name in it of a file at a path or URL. Neither need exist. Any character of the path counts as
    it is. Raises UserError for an unknown scheme or a missing driver."""
    parent, slash, name = url.rpartition("/")
    return _folder_at(f"{parent}/" if slash else "."), name


def refuse_credentials(url: str) -> None:
    """Raise UserError if a URL holds a user, a password, a signature or a token."""
    if holds_credentials(url):
        message = "credentials do not belong into a URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        raise UserError(f"{without_credentials(url)}: {message}")


def open_regular(path: str) -> IO[bytes]:
    """Open a local file to read it. Raises OSError if it is no regular file."""
    require_regular(path)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def require_regular(path: str) -> None:
    """Raise NotRegular if a local file is none: a pipe would keep its reader waiting, and a device may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise NotRegular("is a folder" if stat.S_ISDIR(mode) else "is no regular file")


def _folder_at(url: str) -> Folder:
    """The folder at a path or URL, unseen. Raises UserError for a place that cannot be."""
    if not url.strip():
        raise UserError("the path is empty; give a folder or a URL such as s3://bucket/prefix")
    if "\0" in url:
        raise UserError(f"{url}: holds a NUL character; give a folder or a URL such as s3://bucket/prefix")
    scheme = _scheme(url)
    if scheme in ("", "file"):
        return _local_folder(url, scheme)
    options = _s3_options() if scheme in ("s3", "s3a") else {}
    if options and not url.partition("://")[2].partition("/")[0]:
        raise UserError(f"{url}: has no bucket; write s3://bucket/prefix")
    try:
        with explained(url):
            kind = fsspec.get_filesystem_class(scheme)  # not url_to_fs, to which "::" joins several URLs
            if options:
                import s3fs.core  # slow, so only where it is needed

                s3fs.core.set_custom_error_handler(worth_repeating)
            fs = kind(**{**kind._get_kwargs_from_urls(url), **options})
            path = kind._strip_protocol(url)
    except (ResMasterError, ConnectionError):
        raise
    except Exception as error:  # every kind of store has its own way to turn a URL down
        message = f"not a usable place ({one_line(error)}); give a folder or an s3:// URL"
        raise UserError(f"{without_credentials(url)}: {message}") from error
    return Folder(fs, str(path).rstrip("/"))


def _scheme(url: str) -> str:
    """The scheme of a URL, or "" for a local path. Raises UserError for a URL with one slash, such as `s3:/bucket`."""
    scheme, found, rest = url.partition("://")
    if found and "/" not in scheme:
        if not scheme or (scheme == "file" and not rest.startswith("/")):
            raise UserError(f"{url}: is no whole URL; write file:///folder, s3://bucket/prefix or a path")
        return scheme
    head, colon, _ = url.partition(":")
    if colon and head.lower() in fsspec.available_protocols():
        raise UserError(f"{url}: a URL has two slashes; write {head}://... (or ./{url} for a folder of that name)")
    return ""


def _local_folder(url: str, scheme: str) -> Folder:
    fs = fsspec.filesystem("file")
    try:
        path = str(fs._strip_protocol(url)) if scheme else str(Path(url).expanduser().absolute())
    except RuntimeError:  # ~nobody
        raise UserError(f"{url}: the home folder of this user is not known; write the whole path") from None
    return Folder(fs, path.rstrip("/"))


def _check_endpoint() -> None:
    """Raise UserError for an address of the store that the S3 library would turn down."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        address = os.environ.get(name, "")
        if address and not re.match("https?://", address, re.IGNORECASE):
            raise UserError(f"{name}: {without_credentials(address)} has no http:// or https://")


def _s3_options() -> dict[str, Any]:
    """Options of s3fs: no cache of listings, and requests to a throttling store are repeated, with jitter, for about a
    minute before a task fails.

    The user's settings win: `AWS_RETRY_MODE` and `AWS_MAX_ATTEMPTS`, or fsspec's configuration of `s3`.

    Raises UserError for an address of the store without http:// or https://.
    """
    _check_endpoint()
    config = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
    if not {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys():
        config.setdefault("retries", {"mode": "standard", "total_max_attempts": S3_ATTEMPTS})
    return {"use_listings_cache": False, "config_kwargs": config}


def put_if_absent(fs: Any, path: str, data: bytes) -> None:
    """Create `path` with `data` atomically. Raises FileExistsError if it exists already.

    On a local disk: temporary file, fsync, `os.link` (which fails if the name is taken). Elsewhere: the store's own
    conditional create (`If-None-Match: *` on S3). Its answers "exists" and "precondition failed" both become
    FileExistsError.
    """
    if isinstance(fs, LocalFileSystem):
        if os.path.lexists(path):  # a losing writer need not write the temporary file
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    message = "this file system has no hard links, which commits need; choose another root"
                    raise UserError(f"{path}: {message}") from error
                raise
        _sync_folder(path)
        return
    if isinstance(fs, MemoryFileSystem):
        with _memory_lock:
            fs.pipe_file(path, data, mode="create")
        return
    for attempt in range(CREATE_ATTEMPTS):
        try:
            fs.pipe_file(path, data, mode="create")
            return
        except OSError as error:
            code = store_code(error)
            if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412"):
                raise FileExistsError(errno.EEXIST, "exists already", path) from error
            if code is None and error.errno == errno.EINVAL:  # s3fs, if the server does not name the condition
                raise FileExistsError(errno.EEXIST, "exists already", path) from error
            if code == "NotImplemented":
                message = "this store has no conditional create (If-None-Match), which commits need; choose another one"
                raise UserError(f"{path}: {message}") from error
            if code not in ("ConditionalRequestConflict", "OperationAborted") or attempt == CREATE_ATTEMPTS - 1:
                raise
        time.sleep(0.05 * 2**attempt)


def sha256_of(path: Path) -> str:
    """sha256 (64 hex digits) of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _temporary(path: str, content: bytes | Path) -> Iterator[str]:
    """A complete, synced, hidden file beside `path` with `content` (bytes, or a file to copy). Removed after the
    block."""
    folder, name = os.path.split(path)
    _make_folder(folder)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with content.open("rb") as source:
                    while block := source.read(4 << 20):
                        file.write(block)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)


def _replace(path: str, content: bytes | Path) -> None:
    """Write or replace a local file, durably."""
    with _temporary(path, content) as temporary:
        os.replace(temporary, path)
    _sync_folder(path)


def _make_folder(folder: str) -> None:
    """Make a folder with its parents, durably: after a crash, no commit may be there without its objects' folder."""
    missing = []
    while not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for new in reversed(missing):
        os.makedirs(new, exist_ok=True)
        _sync_folder(new)


def _sync_folder(path: str) -> None:
    """Make the directory entry of `path` durable."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
