"""Renders the page of `resmaster view`, and finds the files that it loads."""

from __future__ import annotations

from html import escape


def render_view(name: str) -> str:
    """The page over all samples of the dataset `name`."""
    return f"<!doctype html><meta charset=utf-8><title>{escape(name)}</title><h1>{escape(name)}</h1>"


def static_file(name: str) -> tuple[bytes, str] | None:
    """(content, media type) of a file that the page loads; None if it loads no such file."""
    return None
