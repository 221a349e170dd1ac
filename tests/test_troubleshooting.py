"""docs/troubleshooting.md quotes messages as the code writes them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkout import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, flags=re.MULTILINE)
GAP = "\0"
"""Stands for what varies in a message of the source."""


def texts(path: Path) -> Iterator[str]:
    """All strings of a file, with a gap for each value that is put into one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)


SOURCE = [
    text
    for folder in ("resmaster_stages", "flows", "tasks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for text in texts(path)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_writes_the_message(message: str) -> None:
    """Its fixed words stand in one string of the source, in this order."""
    words = [part.strip(" :") for part in message.split("...")]
    pattern = re.compile(".*?".join(re.escape(part) for part in words if part), re.DOTALL)
    assert any(pattern.search(text) for text in SOURCE), f"no message of the code reads so any more: {message}"


def test_every_entry_has_a_message_and_an_answer() -> None:
    entries = re.findall(r"^### (.*)\n\n(.+)", PAGE, flags=re.MULTILINE)
    assert len(entries) == len(re.findall(r"^### ", PAGE, flags=re.MULTILINE)) >= 25
    assert len(set(MESSAGES)) == len(MESSAGES)
    assert {heading for heading, _ in entries} - {f"`{message}`" for message in MESSAGES} == {"`SlowDown`, or HTTP 503"}
