import errno
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from botocore.exceptions import (
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    TokenRetrievalError,
)

from resmaster_stages.errors import UserError
from resmaster_stages.redaction import without_credentials
from resmaster_stages.storage import filesystem
from resmaster_stages.storage.filesystem import Folder, open_file, open_folder, open_root, put_if_absent
from resmaster_stages.storage.store_errors import explained, worth_repeating


def test_write_read_list_remove(folder: Folder, tmp_path: Path) -> None:
    assert folder.names("a") == []
    assert not folder.exists("a/x")
    folder.write("a/x", b"1")
    folder.write("a/x", b"2")
    (tmp_path / "source").write_bytes(b"3" * 10)
    folder.upload("a/y", tmp_path / "source")
    folder.write("b", b"4")
    assert folder.names("a") == ["a/x", "a/y"]
    assert folder.names("") == ["a", "b"]
    assert folder.read("a/x") == b"2"
    assert folder.read_many(["a/x", "a/gone", "a/y"]) == {"a/x": b"2", "a/y": b"3" * 10}
    with folder.open("a/y") as file:
        file.seek(8)
        assert file.read() == b"33"
    path, sha256 = folder.download("a/y", tmp_path)
    assert path.read_bytes() == b"3" * 10
    assert sha256 == filesystem.sha256_of(tmp_path / "source")
    folder.remove("a/x")
    folder.remove("a/x")
    assert folder.names("a") == ["a/y"]
    with pytest.raises(FileNotFoundError):
        folder.read("a/x")


def test_readers_of_one_file_do_not_disturb_each_other(folder: Folder) -> None:
    folder.write("x", b"0123456789")
    with folder.open("x") as first, folder.open("x") as second:
        assert (first.read(4), second.read(2), first.read(2)) == (b"0123", b"01", b"45")
    one, other = folder.chunks("x", 4), folder.chunks("x", 6)
    assert (next(one), next(other), next(one), next(other)) == (b"0123", b"012345", b"4567", b"6789")


def test_files_lists_all_depths_with_size_and_time(folder: Folder) -> None:
    assert list(folder.files()) == []
    before = datetime.now(UTC) - timedelta(seconds=2)
    for name, size in (("a", 1), ("b/c/d", 3), ("b/.hidden", 2)):
        folder.write(name, b"x" * size)
    found = sorted(folder.files(), key=lambda file: file.name)
    assert [(file.name, file.bytes) for file in found] == [("a", 1), ("b/.hidden", 2), ("b/c/d", 3)]
    assert all(before < file.modified < datetime.now(UTC) + timedelta(seconds=2) for file in found)
    assert [file.name for file in folder.files("b/c")] == ["b/c/d"]
    assert list(folder.files("b/gone")) == []


@pytest.mark.s3
def test_listings_of_many_pages(s3_root: str) -> None:
    folder = open_root(s3_root)
    names = [f"many/{number:04d}" for number in range(1003)]
    folder.write_many(dict.fromkeys([*names, "many/x/y", "other"], b""))
    assert folder.names("many") == [*names, "many/x"]
    assert sorted(file.name for file in folder.files()) == [*names, "many/x/y", "other"]
    assert folder.names("man") == []


def test_url_leads_back(folder: Folder) -> None:
    folder.write("x", b"1")
    again = open_root(folder.url)
    assert again == folder
    assert again.read("x") == b"1"


def test_create_once(folder: Folder) -> None:
    folder.create("c/1", b"first")
    with pytest.raises(FileExistsError):
        folder.create("c/1", b"second")
    assert folder.read("c/1") == b"first"
    assert folder.names("c") == ["c/1"]


def test_racing_threads_have_one_winner(folder: Folder) -> None:
    barrier, won = threading.Barrier(12), []

    def contend(number: int) -> None:
        barrier.wait()
        try:
            folder.create("c/1", str(number).encode())
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.read("c/1") == str(won[0]).encode()
    assert folder.names("c") == ["c/1"]


def _contend(path: str, number: int, start: float) -> int:
    while os.times().elapsed < start:
        pass
    try:
        put_if_absent(fsspec.filesystem("file"), path, str(number).encode() * 1000)
    except FileExistsError:
        return 0
    return 1


def test_racing_processes_have_one_winner(tmp_path: Path) -> None:
    path = str(tmp_path / "c" / "1")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        for shot in range(5):
            start = os.times().elapsed + 0.02
            wins = pool.starmap(_contend, [(f"{path}{shot}", number, start) for number in range(4)])
            assert sum(wins) == 1
    assert sorted(os.listdir(tmp_path / "c")) == [f"1{shot}" for shot in range(5)]


def test_local_files_obey_the_umask(tmp_path: Path) -> None:
    folder = open_root(str(tmp_path))
    folder.create("a", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_root(str(tmp_path))
    folder.write("a", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (folder.write, folder.create):
        with pytest.raises((UserError, FileExistsError)):
            write("a", b"new")
    with pytest.raises(UserError, match="disk is full"):
        folder.create("b", b"new")
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("way", ["create", "write", "upload"])
def test_a_file_is_on_the_disk_before_its_name_and_then_the_name(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So after a loss of power a name is there with its whole content, or not at all; and the folders above it too."""
    done: list[tuple[str, str]] = []

    def noted(what: str) -> None:
        real = getattr(os, what)

        def call(*arguments: Any, **options: Any) -> Any:
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if what == "fsync" else str(arguments[-1])
            done.append((what, Path(place).relative_to(tmp_path).as_posix()))
            return real(*arguments, **options)

        monkeypatch.setattr(os, what, call)

    (tmp_path / "source").write_bytes(b"content")
    for what in ("fsync", "link", "replace"):
        noted(what)
    folder = open_root(str(tmp_path))
    if way == "upload":
        folder.upload("a/b/c", tmp_path / "source")
    else:
        getattr(folder, way)("a/b/c", b"content")
    named, content = ("link" if way == "create" else "replace", "a/b/c"), done[2]
    assert re.fullmatch(r"a/b/\.c\.\w+\.tmp", content[1])
    assert done == [("fsync", "."), ("fsync", "a"), ("fsync", content[1]), named, ("fsync", "a/b")]


def test_bad_roots(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_root(str(tmp_path / "file"))
    with pytest.raises(UserError, match="a file is in the way"):
        open_root(str(tmp_path / "file" / "below")).create("x", b"")
    with pytest.raises(UserError, match="empty"):
        open_root(" ")


@pytest.mark.parametrize("scheme", ["https", "hf", "gs", "az", "zip", "ftp", "S3", "nonsense", "simplecache::s3"])
def test_only_folders_and_s3_are_roots(scheme: str) -> None:
    with pytest.raises(UserError, match=rf"{scheme}:// cannot be a root; give a folder or s3://bucket/prefix"):
        open_root(f"{scheme}://datasets/x")


def test_a_root_in_memory_would_lose_everything_and_is_refused() -> None:
    """The tests use such roots, so a process without their settings is asked."""
    for verb in ("doctor", "status"):
        done = subprocess.run(
            [sys.executable, "-m", "resmaster_flows.cli.main", verb, "memory://x"], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "memory:// cannot be a root; give a folder or s3://bucket/prefix" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("url", ["s3://name:password@bucket/x", "https://h/x?token=password", "s3://n:pass/word@b"])
def test_a_url_with_credentials_is_refused_without_them(url: str) -> None:
    with pytest.raises(UserError, match="credentials do not belong into a URL; set AWS_ACCESS_KEY_ID") as caught:
        open_folder(url)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("url", ["file://tmp/x", "file://~/x", "://x", "file://"])
def test_a_url_of_a_disk_has_three_slashes(url: str) -> None:
    with pytest.raises(UserError, match="is no whole URL; write file:///folder, s3://bucket/prefix or a path"):
        open_root(url)


@pytest.mark.parametrize(
    "url", ["s3://b/../x", "s3://b/x/../../y", "s3://b/./x", "s3://b//x", "s3://b/x\ny", "s3://b/.."]
)
def test_a_prefix_that_programs_understand_differently_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="write s3://bucket/prefix without them"):
        open_root(url)
    assert open_root("s3://b/x..y/.z//").path == "b/x..y/.z"


@pytest.mark.parametrize("kind", ["dir", "reference", "dbfs", "jupyter", "generic", "async_wrapper", "gs", "nonsense"])
def test_input_at_a_place_that_cannot_be_is_one_line(kind: str) -> None:
    for ask in (lambda: open_folder(f"{kind}://x"), lambda: open_file(f"{kind}://x/prompts.txt")):
        with pytest.raises(UserError, match=rf"^{kind}://x/?: "):
            ask()


@pytest.mark.parametrize("url", ["s3:/datasets", "s3:datasets", "S3:/datasets", "file:/tmp", "https:/host/x"])
def test_a_url_with_one_slash_is_no_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a URL has two slashes; write "):
        open_root(url)
    assert open_root(f"./{url}").path == str(tmp_path / url), "as the message says"


def test_a_root_in_s3_needs_a_bucket() -> None:
    for url in ("s3://", "s3:///x", "s3:////"):
        with pytest.raises(UserError, match="has no bucket"):
            open_root(url)


def test_local_roots_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("file/below", "a file is in the way"),
        ("loop/x", "links lead in a circle"),
        ("x" * 256, "the name is too long"),
        ("x\0y", "NUL"),
    ):
        with pytest.raises(UserError, match=reason):
            open_root(str(tmp_path / name))
    with pytest.raises(UserError, match="write the whole path"):
        open_root("~nobody-of-this-name/x")


def test_a_local_root_is_a_path_or_a_file_url(tmp_path: Path) -> None:
    for name in ("a::b", "c#d", "2024-01-01T10:30"):
        assert open_root(str(tmp_path / name)) == open_root(f"file://{tmp_path / name}")
        assert open_root(str(tmp_path / name)).path == str(tmp_path / name)


class FakeStore:
    """Answers conditional creates as S3 does through s3fs."""

    def __init__(self, *answers: OSError | None) -> None:
        self.answers = list(answers)

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert mode == "create"
        answer = self.answers.pop(0)
        if answer is not None:
            raise answer


def store_error(code: str, number: int) -> OSError:
    error = OSError(number, code)
    error.__cause__ = Exception()
    error.__cause__.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "answer",
    [FileExistsError("x"), store_error("PreconditionFailed", errno.EINVAL), OSError(errno.EINVAL, "At least one ...")],
)
def test_a_store_says_exists_in_three_ways(answer: OSError) -> None:
    with pytest.raises(FileExistsError):
        put_if_absent(FakeStore(answer), "p", b"")


def test_conflicts_are_tried_again_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem.time, "sleep", lambda seconds: None)
    store = FakeStore(*[store_error("ConditionalRequestConflict", errno.EIO)] * 3, None)
    put_if_absent(store, "p", b"")
    assert store.answers == []
    for error in (store_error("InvalidRequest", errno.EINVAL), store_error("SlowDown", errno.EBUSY)):
        store = FakeStore(error, None)
        with pytest.raises(OSError, match=r"InvalidRequest|SlowDown") as caught:
            put_if_absent(store, "p", b"")
        assert not isinstance(caught.value, FileExistsError)
        assert len(store.answers) == 1


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_without_end_is_no_success(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(filesystem.time, "sleep", waits.append)
    store = FakeStore(*[store_error(code, errno.EIO)] * 20)
    with pytest.raises(OSError, match=code) as caught:
        put_if_absent(store, "p", b"")
    assert not isinstance(caught.value, FileExistsError), "nobody has created it"
    assert len(waits) == filesystem.CREATE_ATTEMPTS - 1
    assert sum(waits) < 60


@pytest.mark.parametrize(
    ("code", "status", "repeated"),
    [
        ("TooManyRequests", 429, True),
        ("BadDigest", 400, True),
        ("IncompleteBody", 400, True),
        ("RequestTimeout", 400, False),
        ("OperationAborted", 409, False),
    ],
)
def test_a_refusal_that_may_pass_is_an_outage(code: str, status: int, repeated: bool) -> None:
    """So the shard's task is tried again, and the build does not end."""
    error = store_error(code, errno.EIO)
    error.__cause__.response["ResponseMetadata"] = {"HTTPStatusCode": status}  # type: ignore[union-attr]
    assert worth_repeating(error) is repeated
    with pytest.raises(ConnectionError, match=f"^s3://b: the store answered {code}"), explained("s3://name:word@b"):
        raise error


def test_transient_errors_stay_what_they_are() -> None:
    with pytest.raises(OSError, match="busy") as caught, explained("s3://b"):
        raise OSError(errno.EBUSY, "busy")
    assert caught.type is OSError
    with pytest.raises(UserError, match="permission denied"), explained("s3://b"):
        raise PermissionError("Access Denied")
    with pytest.raises(ConnectionError, match="s3://b: cannot be reached"), explained("s3://b"):
        raise EndpointConnectionError(endpoint_url="http://x")
    with pytest.raises(UserError, match="credentials"), explained("s3://b"):
        raise NoCredentialsError


@pytest.mark.parametrize("kind", [CredentialRetrievalError, TokenRetrievalError])
def test_a_service_of_credentials_may_answer_the_next_time(kind: type[Exception]) -> None:
    with pytest.raises(ConnectionError, match=r"no usable credentials .*slow.*AWS_ACCESS_KEY_ID"), explained("s3://b"):
        raise kind(provider="x", error_msg="slow")


def test_an_error_of_a_disk_names_the_file() -> None:
    with (
        pytest.raises(OSError, match=r"^.Errno 5. Input/output error; look at the disk, .*: '/data/x'$"),
        explained("/data/x"),
    ):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(TimeoutError), explained("/data/x"):
        raise TimeoutError("slow")


@pytest.mark.parametrize(
    ("code", "number", "advice"),
    [
        ("InvalidAccessKeyId", errno.EACCES, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("SignatureDoesNotMatch", errno.EACCES, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", errno.EACCES, "have expired.*AWS_SESSION_TOKEN"),
        ("AccessDenied", errno.EACCES, "lack the right"),
        ("RequestTimeTooSkewed", errno.EACCES, "clock"),
        ("NoSuchBucket", errno.ENOENT, "no such bucket"),
        ("InvalidBucketName", errno.EINVAL, "not a valid bucket name"),
        ("400", errno.EINVAL, "does not say why.*expired.*AWS_DEFAULT_REGION"),
        ("403", errno.EACCES, "does not say why.*expired"),
    ],
)
def test_a_refusal_is_told_by_its_code_with_what_to_do(code: str, number: int, advice: str) -> None:
    with pytest.raises(UserError, match=rf"^s3://b/x: {code}: .*{advice}") as caught, explained("s3://b/x"):
        raise store_error(code, number)
    assert "write" not in str(caught.value)


def test_what_a_store_may_do_better_next_time_is_a_connection_error() -> None:
    for code in ("SlowDown", "503", "InternalError", "SomethingNew"):
        with pytest.raises(ConnectionError, match=f"s3://b: the store answered {code}"), explained("s3://b"):
            raise store_error(code, errno.EBUSY)
    client = type("ConnectError", (Exception,), {"__module__": "httpx"})
    with pytest.raises(ConnectionError, match=r"hf://x: cannot be reached .*check the network"), explained("hf://x"):
        raise client("name not known")


def test_bugs_and_missing_files_are_not_dressed_up() -> None:
    for error in (TypeError("x"), ValueError("x"), KeyError("x"), FileNotFoundError("x"), FileExistsError("x")):
        with pytest.raises(type(error)) as caught, explained("s3://b"):
            raise error
        assert caught.value is error


S3_SETTINGS = [
    ({"AWS_ENDPOINT_URL": "127.0.0.1:9400"}, "^AWS_ENDPOINT_URL: 127.0.0.1:9400 has no http:// or https://$"),
    ({"AWS_ENDPOINT_URL_S3": "localhost"}, "^AWS_ENDPOINT_URL_S3: localhost has no http:// or https://$"),
    ({"AWS_ENDPOINT_URL": "http://me:pass@"}, "S3 cannot be used as it is set up"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"}, "not a valid URI.*AWS_ENDPOINT_URL"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:x"}, "not a valid URI.*AWS_ENDPOINT_URL"),
    ({"AWS_CONFIG_FILE": "[default]\nendpoint_url = localhost:9\n"}, "Invalid endpoint: localhost:9.*http"),
    ({"AWS_CONFIG_FILE": "[default\nx"}, "Unable to parse config file"),
    ({"AWS_DEFAULT_REGION": "no region"}, "no region.*check the AWS_... variables"),
    ({"AWS_PROFILE": "nobody"}, "no usable credentials.*nobody"),
    ({"AWS_MAX_ATTEMPTS": "many"}, "many.*check the AWS_... variables"),
    ({"AWS_RETRY_MODE": "often"}, "often.*check the AWS_... variables"),
]


@pytest.mark.parametrize(("settings", "message"), S3_SETTINGS)
def test_wrong_settings_of_s3_are_one_line(
    settings: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true", **settings}
    if "AWS_CONFIG_FILE" in given:
        (tmp_path / "config").write_text(given["AWS_CONFIG_FILE"])
        given["AWS_CONFIG_FILE"] = str(tmp_path / "config")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=message) as caught:
        open_root("s3://bucket/x").read("a")
    assert "\n" not in str(caught.value)
    assert "pass" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.s3
@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret", "SignatureDoesNotMatch"),
    ],
)
def test_wrong_keys_are_told_by_their_code_whatever_is_asked(
    name: str, value: str, code: str, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    folder = open_root(s3_root)
    for ask in (
        lambda: folder.exists("config.json"),
        lambda: folder.read("config.json"),
        lambda: folder.read_many(["a", "b"]),
        lambda: folder.names(""),
        lambda: list(folder.files()),
        lambda: folder.create("x", b""),
    ):
        with pytest.raises(UserError, match=rf"{code}: .*check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            ask()
    with pytest.raises(UserError, match="not a valid bucket name"):
        open_root("s3://No_Bucket!/x").exists("a")


def test_a_folder_exists_beside_names_that_begin_alike(folder: Folder) -> None:
    for name in ("plan-old/x", "planned", "plan/x"):
        folder.write(name, b"1")
    assert [folder.exists(name) for name in ("plan", "planned", "plan/x", "plan-old", "pla", "plan/y")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip
    assert folder.exists("")


def test_credentials_are_cut_out() -> None:
    assert without_credentials("s3://key:secret@bucket/x") == "s3://bucket/x"
    assert without_credentials("http://host/a@b") == "http://host/a@b"
    assert without_credentials("mail me@x") == "mail me@x"


def test_a_store_that_cannot_be_reached_is_named_when_its_files_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_root("memory://somewhere/else")

    def find(*args: object, **options: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://x")

    monkeypatch.setattr(type(folder.fs), "find", find)
    with pytest.raises(ConnectionError, match=r"somewhere/else.*cannot be reached"):
        list(folder.files())


def test_the_size_of_a_file(folder: Folder) -> None:
    folder.write("a/b", b"12345")
    folder.write("a/empty", b"")
    assert [folder.size(name) for name in ("a/b", "a/empty", "a/none", "none")] == [5, 0, None, None]


def test_names_that_look_like_patterns_are_names(folder: Folder) -> None:
    contents = {f"in [x]/a{sign}.json": sign.encode() for sign in ("[1]", "*", "b", "1")}
    for name, data in contents.items():
        folder.write(name, data)
    assert folder.read_many([*contents, "in [x]/none*.json"]) == contents
    for name, data in contents.items():
        assert folder.read(name) == data
        assert folder.exists(name)
        assert folder.size(name) == len(data)
    assert set(folder.names("in [x]")) == set(contents)
    folder.remove("in [x]/a*.json")
    assert set(folder.names("in [x]")) == set(contents) - {"in [x]/a*.json"}
    folder.remove_all("in [x]")
    assert not list(folder.names("in [x]"))
