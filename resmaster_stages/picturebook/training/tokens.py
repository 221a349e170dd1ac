"""The picturebook's tokenizer: CLIP's byte-level BPE with merges learnt from the grammar's own vocabulary.

Every word of the grammar is one token; any other word still tokenises, down to its bytes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import lru_cache

from transformers import CLIPTokenizer

from resmaster_stages.picturebook.captions import vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    extra = 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first (ties: alphabetical), until every word is one symbol."""
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        count = Counter(pair for parts in spelled.values() for pair in itertools.pairwise(parts))
        if not count:
            return merges
        best = min(count, key=lambda pair: (-count[pair], pair))
        merges.append(best)
        for parts in spelled.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [best[0] + best[1]]
                i += 1


@lru_cache(1)
def make_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer (77 tokens, padded with the end token) built from the grammar."""
    symbols = _byte_symbols()
    merges = _merges(vocabulary())
    words = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)
