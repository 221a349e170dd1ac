"""What may be shown of a text: no credential, no terminal command, and nothing else changed."""

import io
import shlex
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmaster_stages.errors import ShardError
from resmaster_stages.redaction import (
    LINE_CHARACTERS,
    holds_credentials,
    no_secrets_in_errors,
    one_line,
    quoted,
    redacted,
    without_credentials,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://AKIA:se/cr+et@bucket/x", "s3://bucket/x"),
        ("s3://AKIA:12/cr+et@bucket/x", "s3://bucket/x"),
        ("https://me:pass/word@host/x", "https://host/x"),
        ("cannot reach https://me:pass@host:8000/x: no route", "cannot reach https://host:8000/x: no route"),
        ("postgresql+asyncpg://me:pass@db/prefect", "postgresql+asyncpg://db/prefect"),
        ("https://h/x.tar?X-Amz-Date=1&X-Amz-Signature=abc&v=2", "https://h/x.tar?X-Amz-Date=[hidden]&X-Amz-Signature=[hidden]&v=2"),
        ("https://h/x?token=abc", "https://h/x?token=[hidden]"),
        ("https://h/x?sv=2&sig=a%2B", "https://h/x?sv=2&sig=[hidden]"),
    ],
)  # fmt: skip
def test_credentials_are_cut_out_of_addresses(text: str, shown: str) -> None:
    assert holds_credentials(text)
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


@pytest.mark.parametrize(
    "text", ["http://host/a@b", "http://host:8000/a@b", "mail me@x", "s3://bucket/a:b@c", "/a/b?key=1", "a: b@c", "s3://b/x?versionId=1"]
)  # fmt: skip
def test_what_is_no_credential_stays(text: str) -> None:
    assert without_credentials(text) == text or "://" not in text
    assert not holds_credentials(text)


@given(st.text(alphabet="ab:/@?=& s3[]\n", max_size=40))
def test_cutting_twice_changes_nothing_more(text: str) -> None:
    text = "s3://" + text
    assert without_credentials(without_credentials(text)) == without_credentials(text)


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY", "HF_TOKEN", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, f"canary-{name}")
        assert redacted(f"got canary-{name}.") == "got [hidden]."
    monkeypatch.setenv("SHORTEST_PASSWORD", "8 glyphs")
    assert redacted("got 8 glyphs.") == "got [hidden]."
    monkeypatch.setenv("LONGER_PASSWORD", "8 glyphs and more")
    assert redacted("got 8 glyphs and more.") == "got [hidden].", "no part of the longer one is left"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("SHORT_TOKEN", "test")
    assert redacted("a test of parallelism") == "a test of parallelism"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEKEY"),
        ("AWS_ACCESS_KEY_ID", "resmaster"),
        ("AWS_SECRET_ACCESS_KEY", "resmaster"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/home/me/credentials"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
    ],
)
def test_what_is_no_secret_stays_readable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    assert (
        redacted(f"{value}: make one with: {value} run canary-token") == f"{value}: make one with: {value} run [hidden]"
    )


def test_a_terminal_gets_no_commands() -> None:
    assert one_line(ValueError("a\x1b]0;owned\x07b\n c\ud800 é")) == "a\\x1b]0;owned\\x07b c\\ud800 é"
    assert one_line("plain \x1b[2J \x7f") == "plain \\x1b[2J \\x7f"


def test_nothing_turns_the_direction_of_a_line_around() -> None:
    assert one_line("a\u202egnp.exe\u2069 b") == "a\\u202egnp.exe\\u2069 b"
    assert one_line("\u05d0 \u0627 e\u0301") == "\u05d0 \u0627 e\u0301", "foreign letters stay"


def test_a_line_has_no_addresses_of_objects_and_its_end_says_what_to_do() -> None:
    buffer = io.BytesIO()
    assert one_line(f"cannot identify {buffer!r}; convert it") == "cannot identify <_io.BytesIO object>; convert it"
    assert one_line("at 0xdeadbeef stays") == "at 0xdeadbeef stays"
    long = one_line(f"model.id: {'x' * 100_000} is not there; give a folder")
    assert len(long) == LINE_CHARACTERS
    assert long.startswith("model.id: xxx")
    assert long.endswith("x is not there; give a folder")
    assert one_line(long) == long


def test_a_command_to_be_copied_has_no_credentials_and_is_one_word() -> None:
    assert quoted("s3://key:secret@bucket/x") == "s3://bucket/x"
    assert shlex.split(f"resmaster repair {quoted('/a b/$(c)')}") == ["resmaster", "repair", "/a b/$(c)"]


def test_the_notes_of_an_error_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    error = ValueError("wrong")
    error.add_note("unet.py:7 with canary-token")
    assert one_line(error) == "wrong (unet.py:7 with [hidden])"


def test_errors_leave_without_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    with pytest.raises(ShardError) as ours, no_secrets_in_errors():
        raise ShardError("with canary-token")
    with pytest.raises(RuntimeError) as other, no_secrets_in_errors():
        raise KeyError("canary-token")
    for caught, shown in ((ours, "with [hidden]"), (other, "KeyError: '[hidden]'")):
        assert str(caught.value) == shown
        assert caught.value.__cause__ is None
        assert "canary" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(KeyError, match="plain"), no_secrets_in_errors():
        raise KeyError("plain")
