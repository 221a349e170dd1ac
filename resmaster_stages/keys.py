"""Sample keys, seeds and digests, as pure functions of their arguments. They decide what is computed.

Invariants:
- A key is lower-case hex without dots, because WebDataset splits a member's name at its first dot.
- Keys and seeds do not depend on batch, worker, order or retry, so a re-run gives the same bytes. A seed depends on the
  sample's take, which is 0 until somebody asks for another draw of the sample (`dataset.redo`).
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no white space, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def normalise_prompt(text: str) -> str:
    """Apply NFC, turn every run of white space into one blank, and trim. Case stays: text encoders lower it."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _key(*parts: str | int | bytes) -> str:
    hasher = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hasher.update(len(data).to_bytes(8, "big"))
        hasher.update(data)
    return hasher.hexdigest()


def prompt_key(prompt: str, negative_prompt: str, height: int, width: int, replica: int = 0) -> str:
    """Sample key (24 hex digits) of a prompt at a low-resolution size of `height` x `width` px."""
    return _key("prompt", normalise_prompt(prompt), normalise_prompt(negative_prompt), height, width, replica)


def image_key(data: bytes, prompt: str, replica: int = 0) -> str:
    """Sample key (24 hex digits) of a user's own image file with its prompt."""
    return _key("image", data, normalise_prompt(prompt), replica)


def masked_key(key: str, mask: bytes) -> str:
    """Sample key (24 hex digits) of a sample with a detail mask. key: its key without mask. mask: the mask file."""
    return _key("detail_mask", key, mask)


def sample_seed(key: str, base_seed: int, stage: str, take: int = 0) -> int:
    """Seed (63 bits) of a sample in a stage, from the sample's key and take, the dataset's base seed and the stage."""
    text = f"{key}/{base_seed}/{stage}/-1/-1" + (f"/{take}" if take else "")
    data = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(data, "big") & (2**63 - 1)


def digest_of_keys(keys: Sequence[str]) -> str:
    """sha256 (64 hex digits) of several keys, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
