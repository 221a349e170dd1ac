"""What is kept stays within its bytes, and is made once for all who ask."""

import threading
from pathlib import Path

import pytest

from resmaster_stages.gallery.caches import Budget, Kept, KeptOnDisk


def test_what_was_used_last_stays_within_the_limit() -> None:
    kept: Kept[bytes] = Kept(10, len)
    made: list[str] = []

    def get(name: str, size: int) -> bytes:
        return kept.get(name, lambda: made.append(name) or bytes(size))

    get("a", 4), get("b", 4), get("a", 4), get("c", 4)
    assert kept.bytes == 8
    assert kept.peek("b") is None, "a was used later"
    assert (made, kept.peek("a"), kept.peek("c")) == (["a", "b", "c"], bytes(4), bytes(4))
    get("large", 100)
    assert (kept.bytes, kept.peek("a"), kept.peek("large")) == (100, None, bytes(100)), "kept alone"
    get("d", 1)
    assert (kept.bytes, kept.peek("large")) == (1, None)


def test_a_value_that_is_put_again_counts_once() -> None:
    kept: Kept[bytes] = Kept(10, len)
    kept.put("a", bytes(6))
    kept.put("a", bytes(3))
    assert kept.bytes == 3


@pytest.mark.parametrize("fails", [False, True])
def test_what_many_ask_for_at_once_is_made_once(fails: bool) -> None:
    kept: Kept[int] = Kept(10)
    at_work, go_on = threading.Event(), threading.Event()
    made, answers = [], []

    def make() -> int:
        made.append(1)
        at_work.set()
        go_on.wait(30)
        if fails:
            raise OSError("no")
        return 7

    def ask() -> None:
        try:
            answers.append(kept.get("x", make))
        except OSError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    threads[0].start()
    assert at_work.wait(30)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    if fails:
        assert set(answers) == {"no"}
        made.clear()
        assert kept.get("x", lambda: 8) == 8, "a failure is not kept"
    else:
        assert answers == [7] * 6
        assert made == [1] or kept.peek("x") == 7


def test_files_stay_within_the_limit(tmp_path: Path) -> None:
    kept = KeptOnDisk(tmp_path, 100)
    made: list[int] = []

    def get(number: int) -> bytes:
        return kept.get(f"../{number}", lambda: made.append(number) or bytes([number]) * 30)

    for number in (0, 1, 2, 0, 3):
        assert get(number) == bytes([number]) * 30
    assert made == [0, 1, 2, 3]
    assert kept.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) == 90
    assert (get(0), made) == (bytes(30), [0, 1, 2, 3])
    get(1)
    assert made == [0, 1, 2, 3, 1], "it had been used longest ago"
    assert not list(tmp_path.parent.glob("[0-9]")), "names are no paths"


def test_a_file_that_is_gone_is_made_again(tmp_path: Path) -> None:
    kept = KeptOnDisk(tmp_path, 100)
    kept.get("a", lambda: b"x")
    for path in tmp_path.iterdir():
        path.unlink()
    assert kept.get("a", lambda: b"y") == b"y"
    assert kept.bytes == 1


def test_a_full_disk_keeps_nothing_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptOnDisk(tmp_path, 100)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert kept.get("a", lambda: b"x") == b"x"
    assert (kept.bytes, list(tmp_path.iterdir())) == (0, [])


def test_a_budget_lets_the_large_one_be_alone() -> None:
    budget, held, most = Budget(10), [0], [0]
    lock = threading.Lock()

    def work(size: int) -> None:
        with budget.hold(size):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.005)
            with lock:
                assert held[0] <= 10 or held[0] == size
                held[0] -= size

    errors: list[BaseException] = []

    def sure(size: int) -> None:
        try:
            work(size)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=sure, args=(size,)) for size in (3, 30, 4, 5, 30, 2, 10) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (held[0], most[0]) == (0, 30)
