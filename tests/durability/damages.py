"""Damages a finished dataset in one place, in every way that disks, stores and people do.

    for name in objects(folder):
        for damage in damages_of(folder, name):
            apply(folder, damage, name)
    for name in folders(folder):
        apply(folder, "folder gone", name)

`folder` is the dataset's `storage.filesystem.Folder`. On S3, only damages that a store can have are given. What was
there before is not kept: copy it before, if it is to be put back. `damages_of` gives the same for equal datasets, so a
program with a seed may choose from it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from resmaster_stages.storage.filesystem import Folder

Harm = Callable[[bytes], bytes]


def flipped(share: float) -> Harm:
    """Flips one bit at this share of the file's length."""

    def flip(data: bytes) -> bytes:
        at = min(int(len(data) * share), len(data) - 1)
        return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]

    return flip


BYTES: dict[str, Harm] = {
    "emptied": lambda data: b"",
    "halved": lambda data: data[: len(data) // 2],
    "last byte lost": lambda data: data[:-1],
    "longer": lambda data: data + b"\0" * 512,
    "flip at start": flipped(0),
    "flip at a third": flipped(0.35),
    "flip in the middle": flipped(0.5),
    "flip near the end": flipped(0.9),
    "zeros": lambda data: bytes(len(data)),
}
"""Damage -> the file's new content."""

NUMBER = re.compile(rb'(": |\n +)-?\d+(?=[,\n}])')
TEXT = re.compile(rb'": "[^"\n]+"')

JSON: dict[str, Harm] = {
    "huge number": lambda data: NUMBER.sub(rb"\g<1>1000000000000000000000000000000", data, count=1),
    "all numbers huge": lambda data: NUMBER.sub(rb"\g<1>1000000000000000000000000000000", data),
    "all numbers negative": lambda data: NUMBER.sub(rb"\g<1>-1", data),
    "all numbers text": lambda data: NUMBER.sub(rb'\g<1>"x"', data),
    "all texts lists": lambda data: TEXT.sub(rb'": [1]', data),
    "all texts led out": lambda data: TEXT.sub(rb'": "../../etc/passwd"', data),
    "list": lambda data: b"[]\n",
    "empty object": lambda data: b"{}\n",
    "null": lambda data: b"null\n",
    "deep": lambda data: b"[" * 100_000 + b"]" * 100_000,
    "deep object": lambda data: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": lambda data: data.replace(b'"', b'"\xff', 1),
}
"""The same, of JSON files only."""

GONE, ANOTHER = "gone", "another's"
"""Deleted; replaced by the content of another file of its kind."""


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "a file").write_text("x")


ENTRIES: dict[str, Callable[[Path], object]] = {
    "empty folder": Path.mkdir,
    "folder": _folder,
    "pipe": os.mkfifo,
    "link in a circle": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing-there"),
    "link to endless zeros": lambda path: path.symlink_to("/dev/zero"),
}
"""Damage -> makes what stands in the file's place on a disk."""

SHUT = "shut"
"""Without rights to read it. Nothing for root, who may read all."""

FOLDER_GONE = "folder gone"
"""Of folders: deleted with all that is in them."""


def objects(folder: Folder) -> list[str]:
    """The names of all files, sorted."""
    return sorted(file.name for file in folder.files())


def folders(folder: Folder) -> list[str]:
    """The names of all folders, sorted."""
    names = {parent.as_posix() for name in objects(folder) for parent in Path(name).parents}
    return sorted(names - {"."})


def damages_of(folder: Folder, name: str) -> list[str]:
    """The damages that one file can have, each of which changes it."""
    data = folder.read(name)
    kinds = {**BYTES, **(JSON if name.endswith(".json") else {})}
    found = [kind for kind, harm in kinds.items() if harm(data) != data]
    found.append(GONE)
    if _another(folder, name, data) is not None:
        found.append(ANOTHER)
    if folder.local:
        found += [*ENTRIES, *([SHUT] if os.geteuid() else [])]
    return found


def apply(folder: Folder, damage: str, name: str) -> None:
    """Damage the file `name`, or the folder `name` if the damage is `FOLDER_GONE`."""
    if damage == FOLDER_GONE:
        folder.remove_all(name)
    elif damage == GONE:
        folder.remove(name)
    elif damage == SHUT:
        Path(folder.full(name)).chmod(0)
    elif damage in ENTRIES:
        path = Path(folder.full(name))
        path.unlink()
        ENTRIES[damage](path)
    elif damage == ANOTHER:
        other = _another(folder, name, folder.read(name))
        assert other is not None, f"{name} is the only one of its kind"
        folder.write(name, other)
    else:
        folder.write(name, {**BYTES, **JSON}[damage](folder.read(name)))


def clear(folder: Folder, name: str) -> None:
    """Remove whatever stands at `name` on a disk, as a person does who restores the file from a copy."""
    path = Path(folder.full(name))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kind_of(name: str) -> str:
    """What files are of one kind: they differ in numbers, attempts, keys and hashes only."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", name)


def _another(folder: Folder, name: str, data: bytes) -> bytes | None:
    """The content of the next file of the same kind that has other content; None if there is none."""
    kind = kind_of(name)
    alike = [other for other in objects(folder) if other != name and kind_of(other) == kind]
    later = [other for other in alike if other > name]
    for other in (*later, *alike):
        if (found := folder.read(other)) != data:
            return found
    return None
