"""Damages a finished dataset in one place at a time.

`verify` must say it, or nothing is wrong for a reader. `repair` mends it, or it is restored from a copy. In the end,
all that a reader can see is as before.
"""

from __future__ import annotations

import io
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout

from benchmarks.soak.compare import Seen, differences, seen
from benchmarks.soak.processes import Difference
from benchmarks.soak.recipes import Recipe, mended_and_published
from resmaster_flows.cli.main import main
from resmaster_stages.dataset.dataset import open_dataset
from resmaster_stages.errors import ResMasterError
from resmaster_stages.storage.filesystem import Folder
from tests.durability.damages import FOLDER_GONE, apply, clear, damages_of, folders, kind_of, objects

HANG_SECONDS = 120
"""A damage with which a command does not end within this time."""

Damage = tuple[str, str, int]
"""Kind of the file, damage, which of the files of this kind."""


def possible(root: str) -> list[Damage]:
    """Every damage to every file and folder, in an order that equal datasets share."""
    folder = open_dataset(root).folder
    found: list[Damage] = []
    seen_kinds: Counter[str] = Counter()
    for name in objects(folder):
        kind = kind_of(name)
        found += [(kind, damage, seen_kinds[kind]) for damage in damages_of(folder, name)]
        seen_kinds[kind] += 1
    return found + [(name, FOLDER_GONE, 0) for name in folders(folder) if "/" not in name]


def harmed(made: Recipe, root: str, damage: Damage, expected: Seen) -> Counter[str]:
    """Damage a finished dataset once, and mend it. Raises Difference if a damage is not said, or does not go."""
    signal.alarm(HANG_SECONDS)
    folder = open_dataset(root).folder
    name = target(folder, damage)
    copy = {each: folder.read(each) for each in objects(folder)}
    apply(folder, damage[1], name)
    what = f"{root}: {name}, {damage[1]}"
    status, said = verdict(root)
    if status == 0:
        if wrong := wrong_for_readers(root, expected):
            raise Difference(f"{what}: verify says nothing, and {wrong}")
        put_back(folder, copy, damage, name)
        return Counter({"damages": 1, "damages that harm nobody": 1})
    done = Counter({"damages": 1, "damages mended": 1})
    if verdict_of_repair := unrepaired(made, root):
        put_back(folder, copy, damage, name)
        print(f"to be restored from a copy: {what}\n{said}\n{verdict_of_repair}", file=sys.stderr)
        done = Counter({"damages": 1, "damages to be restored from a copy": 1})
    status, after = verdict(root)
    if wrong := after if status else wrong_for_readers(root, expected):
        raise Difference(f"{what}: verify said\n{said}\nand, when all was mended,\n{wrong}")
    put_back(folder, copy, damage, name)  # so that the next damage finds the same files
    return done


def target(folder: Folder, damage: Damage) -> str:
    """The name of the file or folder that is to be damaged."""
    kind, how, number = damage
    alike = [kind] if how == FOLDER_GONE else [name for name in objects(folder) if kind_of(name) == kind]
    if number >= len(alike):
        raise Difference(f"{folder.url}: has no file {number} of the kind {kind} to damage ({how})")
    return alike[number]


def verdict(root: str) -> tuple[int, str]:
    """Exit status and words of `resmaster verify`."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        status = main(["verify", root])
    return status, said.getvalue()


def wrong_for_readers(root: str, expected: Seen) -> str:
    """What a reader finds wrong; empty if nothing."""
    try:
        return "\n".join(differences(seen(root), expected, set())[:5])
    except Exception as error:
        return f"a reader ends by {type(error).__name__}: {error}"


def unrepaired(made: Recipe, root: str) -> str:
    """Repair and publish. What that says, or verify after it, where something must be restored; else empty."""
    try:
        mended_and_published(made, open_dataset(root))
    except (OSError, ResMasterError) as error:
        return f"{type(error).__name__}: {error}"
    status, said = verdict(root)
    return said if status else ""


def put_back(folder: Folder, copy: Mapping[str, bytes], damage: Damage, name: str) -> None:
    """Restore every file from a copy, as a person does who is told to, and remove all others."""
    if folder.local and damage[1] != FOLDER_GONE:
        clear(folder, name)
    there = set(objects(folder))
    for each in there - copy.keys():
        folder.remove(each)
    for each, data in copy.items():
        if each not in there or folder.read(each) != data:
            folder.write(each, data)
