"""Writes Markdown for Prefect's pages."""

from __future__ import annotations

from collections.abc import Sequence

from resmaster_stages.redaction import printable


def cell(value: object) -> str:
    """A value as one table cell: in one line, with Markdown, HTML and unseen characters escaped."""
    text = printable(" ".join(str(value).split()))
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!~" else "&amp;" if c == "&" else c for c in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))
