"""Whatever a store, a network or a disk does, at any verb: one line with what to do, and another try where it helps.

The store is a real S3 server behind a proxy that fails in every way it knows (`tests/faulty_proxy.py`).
"""

import asyncio
import errno
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import s3fs
from botocore.exceptions import ClientError, SSLError

from resmaster_stages.dataset.commit import StoredObject, difference
from resmaster_stages.errors import UserError
from resmaster_stages.storage.filesystem import Folder, open_root
from resmaster_stages.storage.store_errors import explained, is_damage
from tests.faulty_proxy import ALL_FAULTS, ANSWERS, SPOILT, Proxy, Rule, faulty, seeded
from tests.s3_server import S3Server

PERMANENT = {
    "access denied": "lack the right|does not say why",
    "unknown key": "does not know this access key|does not say why",
    "wrong secret": "secret key does not fit|does not say why",
    "expired token": "have expired",
    "invalid token": "session token|does not say why",
    "clock skew": "clock",
    "wrong region": "another region or at another address",
    "no such bucket": "no such bucket",
    "not implemented": "choose another one",
    "not allowed": "choose another one",
    "store full": "store is full|the store answered 507",
    "quota": "quota|does not say why",
    "archived": "archive|does not say why",
    "unknown refusal": "the store refuses this",
}
"""Fault that no retry mends -> what is said of it. The answer to a HEAD request holds no code."""
HEADS = ("open", "chunks", "size", "modified")
"""Verbs that begin with a HEAD request."""
GONE_IS_FINE = ("remove", "remove_all", "abort_upload", "size")
"""Verbs for which a file that is not there is no error."""

Verb = Callable[[Folder, Path], object]


def opened(folder: Folder, name: str) -> bytes:
    with explained(folder.url_of(name)), folder.open(name) as file:
        return file.read()


VERBS: dict[str, Verb] = {
    "read": lambda folder, scratch: folder.read("a/x"),
    "read_many": lambda folder, scratch: folder.read_many(["a/x", "a/y"]),
    "open": lambda folder, scratch: opened(folder, "a/x"),
    "read_part": lambda folder, scratch: folder.read_part("a/x", 1, 3),
    "chunks": lambda folder, scratch: list(folder.chunks("a/x", 4)),
    "exists": lambda folder, scratch: folder.exists("a/x"),
    "size": lambda folder, scratch: folder.size("a/x"),
    "names": lambda folder, scratch: folder.names("a"),
    "files": lambda folder, scratch: [file.name for file in folder.files("a")],
    "unfinished_uploads": lambda folder, scratch: folder.unfinished_uploads(),
    "abort_upload": lambda folder, scratch: folder.abort_upload("a/x", "none"),
    "modified": lambda folder, scratch: folder.modified("a/x"),
    "create": lambda folder, scratch: folder.create(f"made/{uuid.uuid4().hex}", b"x"),
    "write": lambda folder, scratch: folder.write("made/x", b"x"),
    "write_many": lambda folder, scratch: folder.write_many({"made/1": b"x", "made/2": b"y"}),
    "upload": lambda folder, scratch: folder.upload("made/u", scratch / "source"),
    "download": lambda folder, scratch: folder.download("a/x", scratch)[1],
    "remove": lambda folder, scratch: folder.remove("a/none"),
    "remove_all": lambda folder, scratch: folder.remove_all("removed"),
}


@pytest.fixture
def proxy(
    s3_root: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Proxy, Folder]]:
    """A proxy that does nothing yet, and a folder with some files behind it. Nobody waits long for another try."""
    pause = asyncio.sleep
    monkeypatch.setattr("asyncio.sleep", lambda seconds, *rest: pause(min(seconds, 0.001), *rest))
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.001)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1, "connect_timeout": 5}})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    (tmp_path / "source").write_bytes(b"source")
    with faulty(s3_server.endpoint, seeded([])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        folder = open_root(s3_root)
        folder.write_many({"a/x": b"0123456789", "a/y": b"yy", "removed/x": b"x"})
        yield proxy, folder


def damaged(fault: str) -> bool:
    """Whether a fault spoils answers, which can be seen only where their content is checked."""
    return fault in SPOILT


@pytest.mark.s3
@pytest.mark.parametrize("fault", [fault for fault in ALL_FAULTS if fault != "time-out"])
def test_a_store_that_fails_always_is_one_line_and_what_cannot_pass_is_not_tried_again(
    fault: str, proxy: tuple[Proxy, Folder], tmp_path: Path
) -> None:
    server, folder = proxy
    server.choose = seeded([Rule(fault)])
    for verb, ask in VERBS.items():
        server.faults.clear()
        try:
            ask(folder, tmp_path)
        except (UserError, ConnectionError) as error:
            line, permanent = str(error), isinstance(error, UserError)
        else:
            assert damaged(fault) or (fault == "no such bucket" and verb in GONE_IS_FINE), verb
            continue
        assert "\n" not in line, verb
        assert len(line) < 500, verb
        assert "; " in line, (verb, "what to do")
        assert folder.path in line, (verb, "where")
        unsaid = verb in HEADS and fault in ANSWERS and ANSWERS[fault][0] == 400
        assert permanent == (fault in PERMANENT or unsaid), (verb, line)
        if fault in PERMANENT:
            assert re.search(PERMANENT[fault], line), (verb, line)
            if fault != "wrong region":  # which botocore looks for itself
                assert sum(server.faults.values()) <= 3, (verb, "it was asked again")


@pytest.mark.s3
@pytest.mark.parametrize("fault", [fault for fault in ALL_FAULTS if fault not in PERMANENT | {"time-out": ""}])
def test_a_store_that_fails_once_is_asked_again_and_nobody_sees_it(
    fault: str, proxy: tuple[Proxy, Folder], tmp_path: Path
) -> None:
    server, folder = proxy
    for verb, ask in VERBS.items():
        unsaid = verb in HEADS and fault in ANSWERS and ANSWERS[fault][0] in (400, 429)
        if unsaid or fault in ("short", "not xml") or (fault, verb) == ("bit flip", "names"):
            continue  # such an answer looks like a right one, or does not say what is wrong
        expected = ask(folder, tmp_path)
        folder.write("removed/x", b"x")
        server.choose = seeded([Rule(fault, strikes=1)])
        server.seen.clear()
        try:
            found = ask(folder, tmp_path)
        except FileExistsError:
            assert verb == "create"  # the store had done what was asked; the commit then looks who did it
            found = expected
        server.choose = seeded([])
        if verb not in ("modified", "read_part", "open", "chunks") or fault != "bit flip":  # parts have no checksum
            assert found == expected, verb


@pytest.mark.s3
def test_an_object_that_arrived_damaged_is_fetched_once_more(proxy: tuple[Proxy, Folder], tmp_path: Path) -> None:
    server, folder = proxy
    stored = StoredObject("a/x", sha256(b"0123456789").hexdigest(), 10)
    for fault in ("bit flip", "short", "not xml"):
        server.choose = seeded([Rule(fault, methods="GET", key="a/x", strikes=1)])
        server.seen.clear()
        assert folder.download("a/x", tmp_path, stored.sha256)[1] == stored.sha256
        server.seen.clear()
        assert difference(folder, stored) is None
    server.choose = seeded([])
    folder.write("a/x", b"012345678X")
    assert folder.download("a/x", tmp_path, stored.sha256)[1] != stored.sha256
    assert difference(folder, stored) == "changed"


@pytest.mark.s3
def test_damage_on_the_way_is_called_damage(proxy: tuple[Proxy, Folder], tmp_path: Path) -> None:
    server, folder = proxy
    server.choose = seeded([Rule("bit flip")])
    for verb in ("read", "read_many", "download"):
        with pytest.raises(ConnectionError, match=r"the answer arrived damaged .*; run the same command again$"):
            VERBS[verb](folder, tmp_path)


class Listing:
    """An S3 library whose pages lack something, or never end."""

    protocol = "s3"
    req_kw: ClassVar[dict[str, str]] = {}

    def __init__(self, page: dict[str, object]) -> None:
        self.page = page

    def call_s3(self, verb: str, **asked: object) -> dict[str, object]:
        return self.page

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"

    def modified(self, path: str) -> object:
        return self.page.get("LastModified")


MOMENT = datetime(2026, 11, 28, tzinfo=UTC)


@pytest.mark.parametrize(
    "page",
    [
        {"Contents": [{}]},
        {"Contents": [{"Key": "p/x", "Size": "much", "LastModified": MOMENT}]},
        {"Contents": [{"Key": "p/x", "Size": 1, "LastModified": "yesterday"}]},
        {"Contents": [{"Key": "p/x", "Size": 1}]},
        {"CommonPrefixes": [{}]},
        {"Contents": None},
        {"IsTruncated": True},
        {"IsTruncated": True, "NextContinuationToken": "same", "NextKeyMarker": "same", "NextUploadIdMarker": "same"},
        {"Uploads": [{"Key": "p/x"}], "Contents": [{}]},
    ],
)
def test_a_listing_that_no_s3_store_sends_is_one_line(page: dict[str, object]) -> None:
    folder = Folder(Listing(page), "b/p")
    asks: list[Callable[[], object]] = [lambda: list(folder.files()), lambda: folder.names("")]
    if "Uploads" in page or "IsTruncated" in page:
        asks.append(folder.unfinished_uploads)
    for ask in asks:
        with pytest.raises(ConnectionError, match=r"^s3://b/p/?: the answer is not that of an S3 store .*; check"):
            ask()
    with pytest.raises(ConnectionError, match="the answer is not that of an S3 store"):
        folder.modified("x")


# ----------------------------------------------------------------------------------------------------------------------
# disks

FOR_EVER = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "EFBIG", "EILSEQ", "EINVAL", "ENOTDIR")
PASSING = ("EIO", "ESTALE", "EMFILE", "ENFILE", "ETIMEDOUT", "ENOTCONN", "EBUSY", "EHOSTDOWN", "EREMOTEIO", "ENODEV")
CALLS = {
    "os.fsync": ("create", "write", "write_many", "upload"),
    "os.replace": ("write", "write_many", "upload"),
    "os.link": ("create",),
    "builtins.open": ("read", "read_many", "open", "chunks", "write", "create"),
    "os.remove": ("remove",),
}
"""Call of the operating system -> the verbs that make it on a disk."""


@pytest.mark.parametrize("name", FOR_EVER + PASSING)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_a_disk_is_one_line_that_says_what_to_do(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, name)
    folder = open_root(str(tmp_path / "data"))
    folder.write_many({"a/x": b"0123456789", "a/y": b"y", "a/none": b""})
    (tmp_path / "source").write_bytes(b"source")
    if (call, name) == ("os.link", "EPERM"):
        pytest.skip("means a file system without hard links, which has a line of its own")

    def fails(path: object, *arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    for verb in CALLS[call]:
        with monkeypatch.context() as patch:
            patch.setattr(call, fails)
            try:
                VERBS[verb](folder, tmp_path)
            except (UserError, OSError) as error:
                caught = error
            else:
                pytest.fail(f"{verb} hides the error")
        assert isinstance(caught, UserError) == (name in FOR_EVER), verb
        assert str(tmp_path) in str(caught), (verb, "where")
        assert "; " in str(caught), (verb, "what to do")
        assert "\n" not in str(caught), verb
    assert sorted(file.name for file in folder.files() if file.name.endswith(".tmp")) == []


def test_a_full_scratch_disk_is_not_taken_for_a_full_store() -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(tempfile.gettempdir())}: the disk is full; "):  # noqa: SIM117
        with explained("s3://bucket/x"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_store_refuses_is_no_damage_of_an_object() -> None:
    """Else a repair would compute the object again."""
    refused = ClientError({"Error": {"Code": "New"}, "ResponseMetadata": {"HTTPStatusCode": 418}}, "GetObject")
    error = OSError(errno.EIO, "as s3fs tells unknown codes")
    error.__cause__ = refused
    with pytest.raises(UserError, match="the store refuses this") as caught, explained("s3://bucket/x"):
        raise error
    assert not is_damage(caught.value)


def test_a_certificate_that_is_not_known_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="AWS_CA_BUNDLE"), explained("s3://bucket/x"):
        raise SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    with pytest.raises(ConnectionError, match="cannot be reached"), explained("s3://bucket/x"):
        raise SSLError(endpoint_url="https://x", error="EOF occurred in violation of protocol")
