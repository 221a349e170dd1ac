"""Says in one line what went wrong at a folder or in an object store, and what to do.

Invariant: a mistake that no retry can mend is a UserError, and an outage is a ConnectionError. Bugs pass unchanged.
"""

from __future__ import annotations

import configparser
import errno
import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.redaction import one_line, without_credentials

_PERMANENT = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "permission denied; check the rights of this user there, or choose another place",
    errno.EPERM: "operation not permitted; check the rights of this user there, or choose another place",
    errno.ENOTDIR: "a file is in the way where a folder is needed; choose another place",
    errno.EISDIR: "a folder is in the way where a file is needed; remove the folder, or choose another place",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.ELOOP: "links lead in a circle; mend them, or choose another place",
    errno.EFBIG: "the file is too large for this file system, or for this user (ulimit -f); choose another place",
    errno.EINVAL: "this file system cannot do that, or takes no such name; choose another place",
    errno.EILSEQ: "this file system takes no such name; choose another name",
    errno.ENOSYS: "this file system cannot do what is needed here; choose another place",
    errno.EOPNOTSUPP: "this file system cannot do what is needed here; choose another place",
}
"""Error of a disk -> what it means and what to do. No retry mends these."""

_MOUNT = "look at the mount or its server, then run the same command again"
_PASSING = {
    errno.EIO: "look at the disk, then run the same command again",
    errno.ESTALE: _MOUNT,
    errno.ENOTCONN: _MOUNT,
    errno.ENODEV: _MOUNT,
    errno.ENXIO: _MOUNT,
    errno.EREMOTEIO: _MOUNT,
    errno.EHOSTDOWN: _MOUNT,
    errno.ETIMEDOUT: _MOUNT,
    errno.EMFILE: "raise the limit of open files (ulimit -n), then run the same command again",
    errno.ENFILE: "the machine has too many open files; close programs, then run the same command again",
    errno.EBUSY: "another program uses it; run the same command again",
    errno.ETXTBSY: "another program uses it; run the same command again",
    errno.ENOLCK: "the file system gives no lock; run the same command again",
}
"""Error of a disk that may pass -> what to do."""

_OWN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""Errors that no store raises without a code of its own, so that a copy on this machine's disk is meant."""

_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
_EXPIRED = "the credentials have expired; get new ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)"
_TOKEN = "the session token is not valid; check AWS_SESSION_TOKEN"
_RIGHTS = "these credentials lack the right to do this there; give it to them, or use others"
_UNSAID = (
    "the store does not say why: the credentials are wrong, have expired or lack the right, or the clock of this "
    f"machine is wrong; {_KEYS}"
)
_BUCKET_NAME = "not a valid bucket name; it has 3 to 63 lower-case letters, digits, dots and dashes"
_REGION = "the bucket is in another region or at another address; set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL"
_REDIRECTS = f"the store sends requests elsewhere: {_REGION} (with https:// if the store asks for it)"
_UNABLE = "this store cannot do what is needed here; choose another one"
_FULL = "the store is full, or the quota there is used up; free some space, then run the same command again"
_REFUSALS = {
    "InvalidAccessKeyId": f"the store does not know this access key; {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key does not fit the access key; {_KEYS}",
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "InvalidToken": _TOKEN,
    "InvalidClientTokenId": _TOKEN,
    "AccessDenied": _RIGHTS,
    "AllAccessDisabled": _RIGHTS,
    "AccountProblem": _RIGHTS,
    "InvalidSecurity": _KEYS,
    "NotSignedUp": _KEYS,
    "401": _UNSAID,
    "403": _UNSAID,
    "400": f"{_UNSAID}; check AWS_DEFAULT_REGION too",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "NoSuchBucket": "no such bucket; create it, or choose another one",
    "InvalidBucketName": _BUCKET_NAME,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REDIRECTS,
    "302": _REDIRECTS,
    "307": _REDIRECTS,
    "308": _REDIRECTS,
    "NotImplemented": _UNABLE,
    "501": _UNABLE,
    "MethodNotAllowed": _UNABLE,
    "405": _UNABLE,
    "InvalidObjectState": "the object lies in an archive of the store; have it restored first",
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
    "InsufficientStorage": _FULL,
    "507": _FULL,
}
"""Code of an S3 store's answer -> what it means and what to do. No retry mends these.

An answer to a HEAD request has no body, so the store's own code is missing there, and the HTTP status stands for it."""

_AGAIN = {
    "TooManyRequests": "",
    "429": "",
    "BadDigest": "what was sent arrived damaged",
    "XAmzContentChecksumMismatch": "what was sent arrived damaged",
    "IncompleteBody": "what was sent arrived cut off",
    "RequestTimeout": "what was sent did not arrive in time",
    "ConditionalRequestConflict": "",
    "OperationAborted": "",
    "408": "",
    "409": "",
    "412": "",
    "425": "",
}
"""Code with a status of 4xx that another try may overcome -> what it means, where the code does not say so."""

_REPEATED = ("TooManyRequests", "429", "BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody")
"""Codes after which a request is sent again that the S3 library would give up."""

_UNREADABLE = (errno.EIO, errno.EISDIR, errno.ELOOP)

_OF_ONE_OBJECT = ("AccessDenied", "InvalidObjectState")
"""Codes with which a store refuses to read one object, and may well read others."""


class NotRegular(OSError):
    """A folder, a pipe or a device is in the place of a file. Reading it could wait for ever, or never end."""


SHOWN_CHARACTERS = 200
"""Of a library's own message, so much is shown."""

_S3_LIBRARIES = {"botocore", "aiobotocore", "s3fs"}
_NETWORK_LIBRARIES = {"aiohttp", "httpx", "httpx2", "httpcore", "huggingface_hub", "requests", "urllib3"}


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn errors about `place` into one line: a UserError if no retry can mend it, else a ConnectionError.

    Missing files and existing ones (FileNotFoundError, FileExistsError) and bugs pass unchanged. Errors of a local disk
    that may pass stay of their kind, and name their file.
    """
    try:
        yield
    except ResMasterError:
        raise
    except Exception as error:
        told = _told(without_credentials(place), error)
        if told is None:
            raise
        raise told from error


def is_damage(error: Exception) -> bool:
    """Whether an error of a read says that this one file is damaged: the disk cannot read it, or a folder, a pipe, a
    device or a link in a circle is in its place."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    if isinstance(cause, NotRegular):
        return True
    return isinstance(cause, OSError) and cause.errno in _UNREADABLE and store_code(cause) is None


def is_unreadable(error: Exception) -> bool:
    """Whether an error of a read concerns this one file alone: it is damaged, or nobody may read it here. Otherwise the
    credentials, the store, the mount or this machine is at fault, and other files cannot be read either."""
    if (code := store_code(error)) is not None:
        return code in _OF_ONE_OBJECT
    return is_damage(error) or isinstance(error.__cause__, PermissionError)


def is_damaged_answer(error: Exception) -> bool:
    """Whether an answer of a store arrived with another checksum than the store named."""
    return any(type(each).__name__ == "FlexibleChecksumError" for each in _chain(error))


def worth_repeating(error: Exception) -> bool:
    """Whether a request is to be sent again that the S3 library would give up, because it, or its answer, was damaged
    on the way, or the store has too many requests at the moment."""
    return is_damaged_answer(error) or store_code(error) in _REPEATED


def _told(place: str, error: Exception) -> Exception | None:
    """The error that says in one line what went wrong at `place`; None if `error` is to pass unchanged."""
    if (code := store_code(error)) is not None:
        return _of_store(place, code, error)
    if isinstance(error, (FileNotFoundError, FileExistsError)):
        return None
    library = type(error).__module__.partition(".")[0]
    if library in ("botocore", "aiobotocore"):
        return _of_botocore(place, error)
    if library in _NETWORK_LIBRARIES:
        return _unreachable(place, error)
    if isinstance(error, NotRegular):
        return UserError(f"{place}: {error}; remove it, and restore the file if it was one")
    if isinstance(error, OSError):
        return _of_disk(place, error)
    return _of_libraries(place, error)


def _of_store(place: str, code: str, error: Exception) -> Exception | None:
    """What a store's own code says. None for a missing file, or one that exists."""
    if code in _REFUSALS:
        return UserError(f"{place}: {code}: {_REFUSALS[code]}")
    if isinstance(error, (FileNotFoundError, FileExistsError)):
        return None
    said = _AGAIN.get(code) or _shown(error)
    if 400 <= _status(error) < 500 and code not in _AGAIN:
        return UserError(f"{place}: the store refuses this ({code}: {said}); check the settings of the store and of S3")
    return ConnectionError(f"{place}: the store answered {code} ({said}); run the same command again")


def _of_disk(place: str, error: OSError) -> Exception | None:
    """What an error of the operating system says. None if it needs no more words."""
    number = errno.EACCES if isinstance(error, PermissionError) and error.errno is None else error.errno
    if number in _OWN_DISK and "://" in place:
        place = str(error.filename or tempfile.gettempdir())
    if number in _PERMANENT:
        return UserError(f"{place}: {_PERMANENT[number]}")
    if number in _PASSING:
        return OSError(number, f"{os.strerror(number)}; {_PASSING[number]}", error.filename or place)
    if isinstance(error, TimeoutError) and not error.args:
        return ConnectionError(f"{place}: no answer in time; run the same command again")
    # the error of a read names no file
    return OSError(error.errno, error.strerror, place) if error.strerror and not error.filename else None


def _of_botocore(place: str, error: Exception) -> Exception:
    """What an error of the S3 library itself says: no credentials, no connection, or wrong settings."""
    from botocore import exceptions as known  # botocore raised the error, so it is loaded
    from botocore.parsers import ResponseParserError

    unusable = (
        f"{place}: no usable credentials ({one_line(error)}); set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY or a profile"
    )
    if isinstance(error, (known.CredentialRetrievalError, known.TokenRetrievalError, known.MetadataRetrievalError)):
        return ConnectionError(unusable)  # the service that hands out credentials may answer the next time
    if isinstance(
        error, (known.NoCredentialsError, known.PartialCredentialsError, known.ProfileNotFound, known.SSOError)
    ):
        return UserError(unusable)
    if isinstance(error, (known.IncompleteReadError, known.FlexibleChecksumError, ResponseParserError)):
        return ConnectionError(f"{place}: the answer arrived damaged ({_shown(error)}); run the same command again")
    if isinstance(error, known.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return UserError(
            f"{place}: the certificate of the store is not known here ({_shown(error)}); set AWS_CA_BUNDLE to the file "
            "with its authority's certificate"
        )
    if isinstance(error, (known.HTTPClientError, known.ConnectionError)):
        return _unreachable(place, error)
    return _wrong_settings(place, error)


def _unreachable(place: str, error: Exception) -> ConnectionError:
    address = "AWS_ENDPOINT_URL" if place.startswith("s3://") else "the address"
    return ConnectionError(
        f"{place}: cannot be reached ({_shown(error) or type(error).__name__}); check the network and {address}"
    )


def _shown(error: Exception) -> str:
    """The message of a library, as one line of bounded length."""
    return one_line(error)[:SHOWN_CHARACTERS]


def _wrong_settings(place: str, error: Exception) -> UserError:
    if "Invalid bucket name" in str(error):
        return UserError(f"{place}: {_BUCKET_NAME}")
    mend = "check the AWS_... variables and ~/.aws/config"
    if "endpoint" in str(error):
        mend = "an address of a store begins with http:// or https:// and a host: check AWS_ENDPOINT_URL or the profile"
    return UserError(f"{place}: S3 cannot be used as it is set up ({one_line(error)}); {mend}")


def _of_libraries(place: str, error: Exception) -> Exception | None:
    """What a plain Python error means that a library of stores raised. None if the error came from elsewhere, or is of
    a kind that bugs raise."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    libraries = {str(name).partition(".")[0] for name in frames}
    if isinstance(error, NotImplementedError) and "fsspec" in libraries:
        return UserError(f"{place}: a place of this kind cannot be used; give a folder or an s3:// URL")
    if isinstance(error, ImportError) and "fsspec" in libraries:
        return UserError(f"{place}: needs a library that is missing ({one_line(error)})")
    if isinstance(error, (ValueError, configparser.Error)) and libraries & _S3_LIBRARIES:
        return _wrong_settings(place, error)
    if isinstance(error, RecursionError) and libraries & _S3_LIBRARIES:  # botocore follows redirects without end
        return UserError(f"{place}: {_REDIRECTS}")
    if isinstance(error, RuntimeError) and libraries & (_S3_LIBRARIES | _NETWORK_LIBRARIES):
        return _unreachable(place, error)
    return None


def store_code(error: Exception) -> str | None:
    """The store's own error code in an error of botocore, or behind an error of s3fs. None if there is none."""
    code = _response(error).get("Error", {}).get("Code")
    return None if code is None else str(code)


def _status(error: Exception) -> int:
    """The HTTP status of the store's answer behind an error; 0 if it is not known."""
    return int(_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _response(error: Exception) -> dict[str, Any]:
    """The answer of the store that an error of botocore, or one that was raised from it, holds; empty if none does."""
    return next((each.response for each in _chain(error) if isinstance(getattr(each, "response", None), dict)), {})


def _chain(error: BaseException | None) -> Iterator[Any]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
