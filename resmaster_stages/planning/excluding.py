"""Tells which samples of an input are not planned, because they were excluded now or in an earlier run."""

from __future__ import annotations

from resmaster_stages.dataset.exclusions import exclude, read_exclusions
from resmaster_stages.errors import PlanError
from resmaster_stages.inspection.key_lists import Finder, KeyList
from resmaster_stages.redaction import quoted
from resmaster_stages.storage.digests import DigestSet
from resmaster_stages.storage.filesystem import Folder


class Excluding:
    """The exclusions of one reading of the input."""

    def __init__(self, folder: Folder, planned: DigestSet, asked: KeyList | None) -> None:
        """folder: the dataset's, which need not exist. planned: the keys in its plan. asked: list of this run.

        Raises PlanError if an earlier list cannot be read.
        """
        self._folder, self._planned, self._asked = folder, planned, asked
        self._earlier = read_exclusions(folder)
        self._finder = Finder(asked) if asked else None
        self._found: list[str] = []

    def reason(self, key: str) -> str:
        """Why a sample is not planned; "" if it is. Raises PlanError if a sample of the list is planned already."""
        if self._finder and self._asked and self._finder.means(key):
            if bytes.fromhex(key) in self._planned:
                place = quoted(self._folder.url)
                raise PlanError(
                    f"{self._asked.option}: sample {key} is planned already, and a plan never changes; for another "
                    f"draw of the sample run: resmaster repair {place} --redo {key}; to keep it from readers, "
                    f"reject it with: resmaster view {place}"
                )
            self._found.append(key)
            return f"excluded by {self._earlier.get(key, self._asked.name)}"
        if key in self._earlier and bytes.fromhex(key) not in self._planned:
            return f"excluded by {self._earlier[key]}"
        return ""

    def require(self) -> None:
        """Raise UserError, which names the first, if a member of the list means none or several of the samples."""
        if self._finder:
            self._finder.require("no input", "a key is of one prompt or image, low-res size and replica")

    def keep(self) -> None:
        """Keep the list in the dataset, for all later runs."""
        if self._asked:
            exclude(self._folder, self._found, self._asked.name)
