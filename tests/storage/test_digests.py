import random

from resmaster_stages.storage.digests import DIGEST_BYTES, DigestSet, digest_of


def test_it_is_a_set() -> None:
    """As Python's own, for digests that are spread and for those that crowd one table and one slot."""
    chance = random.Random(0)
    spread = [chance.randbytes(DIGEST_BYTES) for _ in range(5_000)]
    crowded = [b"\1" + bytes(8) + number.to_bytes(3) for number in range(1, 60)]
    found, expected = DigestSet(), set[bytes]()
    for digest in chance.choices(spread + crowded, k=9_000):
        assert found.add(digest) == (digest not in expected)
        expected.add(digest)
        assert len(found) == len(expected)
    assert [digest in found for digest in spread + crowded] == [digest in expected for digest in spread + crowded]


def test_it_takes_little_memory() -> None:
    found = DigestSet()
    for number in range(50_000):
        assert found.add(digest_of(f"name {number}"))
    assert sum(map(len, found._tables)) < 27 * len(found)
