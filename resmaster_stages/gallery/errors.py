"""Why a request cannot be answered, beside mistakes in the request (UserError)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from resmaster_stages.dataset.dataset import Dataset
from resmaster_stages.errors import ResMasterError, SampleError, ShardError, UserError
from resmaster_stages.redaction import one_line, quoted


class NotThere(ResMasterError):
    """There is no such sample, or the object that holds it is gone."""


class Unreadable(ResMasterError):
    """The dataset's store or one of its objects cannot be read or written now."""


@contextmanager
def told(dataset: Dataset, name: str) -> Iterator[None]:
    """Turn errors of reading the object `name` of a dataset into NotThere and Unreadable, which say what to do."""
    place = quoted(dataset.url)
    mend = f"run: resmaster verify {place}, then: resmaster repair {place}"
    try:
        yield
    except FileNotFoundError as error:
        raise NotThere(f"{name} is gone; {mend}") from error
    except (ShardError, SampleError) as error:
        raise Unreadable(f"{one_line(error)}; {mend}") from error
    except (OSError, UserError) as error:
        raise Unreadable(one_line(error)) from error
