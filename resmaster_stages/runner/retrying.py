"""The retry policy: which failures of a shard's stage are tried again, how often and after which delays.

Invariants:
- The user's mistakes, too many failed samples and a lost GPU are never retried, because the result would be the same.
- All other failures (object store hiccups, time-outs, full queues) are retried, with growing, jittered delays.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from resmaster_stages.errors import ResMasterError
from resmaster_stages.progress import Note, emit
from resmaster_stages.redaction import one_line

RETRIES = 3
BACKOFF_SECONDS = 2.0
"""The first delay. Each delay is twice the one before."""
RETRY_JITTER = 0.5
"""A delay grows by a random share of up to so much."""

T = TypeVar("T")


def may_pass(error: Exception) -> bool:
    """Whether another try may succeed: not after an error that this project raises on purpose."""
    return not isinstance(error, ResMasterError)


def retried(work: Callable[[], T], name: str) -> T:
    """Call `work`, and again after errors that may pass. name: what is said to be tried again."""
    for retry in range(RETRIES):
        try:
            return work()
        except Exception as error:
            if not may_pass(error):
                raise
            delay = BACKOFF_SECONDS * 2**retry * random.uniform(1, 1 + RETRY_JITTER)
            emit(Note(f"{name}: {type(error).__name__}: {one_line(error)}; trying again in {delay:.0f} s"))
        time.sleep(delay)
    return work()
