"""The JSON of `python -m benchmarks.gpu` as tables of docs/speed.md: `python -m benchmarks.gpu.tables docs/speed.md
REPORT...`

Knows nothing about how anything was measured. Invariant: what failed or was skipped is named below its table.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- GPU tables: begin -->", "<!-- GPU tables: end -->"
Entry = dict[str, Any]
Column = tuple[str, Callable[[Entry], str]]

LABELS = ("variant", "what", "dtype", "rows", "views", "pack", "part")
"""What names an entry."""


def _number(name: str, form: str = "{:.1f}", scale: float = 1.0) -> Callable[[Entry], str]:
    def show(entry: Entry) -> str:
        value = entry.get(name)
        return "" if value is None else form.format(scale * value)

    return show


def _text(name: str) -> Callable[[Entry], str]:
    return lambda entry: str(entry.get(name, ""))


def _part(name: str) -> Callable[[Entry], str]:
    return lambda entry: _number(name)(entry.get("parts") or {})


def _reckoned(entry: Entry) -> str:
    found = entry.get("reckoned")
    return f"{found['seconds']:.1f} for {found['steps']}" if found else ""


IMAGE: tuple[Column, ...] = (
    ("px", _text("pixels")),
    ("steps measured", _text("steps_measured")),
    ("seconds", _number("seconds")),
    ("encode", _part("encode")),
    ("image prompts", _part("image_prompts")),
    ("denoise", _part("denoise")),
    ("decode", _part("decode")),
    ("reckoned seconds", _reckoned),
    ("calls", _text("calls")),
    ("native rows", _number("native_rows", "{:.0f}")),
    ("peak GB", _number("peak_bytes", "{:.1f}", 1e-9)),
    ("expected GB", _number("estimated_bytes", "{:.1f}", 1e-9)),
    ("first image, s", _number("warm_up_seconds")),
)
TABLES: dict[str, dict[str, tuple[str, tuple[Column, ...]]]] = {
    "ceilings": {
        "ceilings": (
            "What the card does at best",
            (
                ("operation", _text("what")),
                ("numbers", _text("dtype")),
                ("TFLOP/s", _number("tflops")),
                ("TB/s, read and written", _number("terabytes_per_second", "{:.2f}")),
            ),
        )
    },
    "rows": {
        "rows": (
            "SDXL's UNet with an IP-Adapter, random weights, per row (a native view of one guidance branch)",
            (
                ("variant", _text("variant")),
                ("numbers", _text("dtype")),
                ("rows a call", _text("rows")),
                ("ms a row", _number("ms_per_row", "{:.2f}")),
                ("TFLOP/s", _number("tflops", "{:.0f}")),
                ("of the matrix product's", _number("share_of_matmul_ceiling", "{:.0f} %", 100)),
                ("first call, s", _number("first_call_seconds")),
            ),
        ),
        "profiles": (
            "Where the time of a call goes",
            (
                ("variant", _text("variant")),
                ("rows a call", _text("rows")),
                ("share of the device's time", lambda entry: _shares(entry.get("shares") or {})),
            ),
        ),
    },
    "image": {
        "images": ("ResMaster, the largest image", (("what", _text("what")), *IMAGE)),
        "methods": ("Every method, eager", (("method", _text("what")), *IMAGE)),
        "turns": (
            "Base model and captioner take turns on the device, as between two passes (`via`)",
            (
                ("base model, GB", _number("base_model_bytes", "{:.1f}", 1e-9)),
                ("captioner, GB", _number("captioner_bytes", "{:.1f}", 1e-9)),
                ("captioner comes, s", _number("captioner_comes_seconds")),
                ("base model comes, s", _number("base_model_comes_seconds")),
                ("peak GB", _number("peak_bytes", "{:.1f}", 1e-9)),
            ),
        ),
        "saving": (
            "Files of such an image, lossless, on one core",
            (
                ("px", _text("pixels")),
                ("WebP, s", _number("webp_seconds")),
                ("WebP, MB", _number("webp_bytes", "{:.1f}", 1e-6)),
                ("PNG, s", _number("png_seconds")),
                ("PNG, MB", _number("png_bytes", "{:.1f}", 1e-6)),
            ),
        ),
    },
    "flow": {
        "models": (
            "Transformers with random weights, in bfloat16, with a VAE in float32",
            (
                ("model", _text("what")),
                ("billions of parameters", _number("parameters", "{:.1f}", 1e-9)),
                ("GB, VAE included", _number("bytes", "{:.1f}", 1e-9)),
                ("TFLOP a view", _number("tflop_per_view")),
                ("made in s", _number("seconds")),
            ),
        ),
        "views": (
            "Their native views of 1024 px",
            (
                ("model", _text("what")),
                ("variant", _text("variant")),
                ("views a call", _text("views")),
                ("ms a view", _number("ms_per_view")),
                ("TFLOP/s", _number("tflops", "{:.0f}")),
                ("of the matrix product's", _number("share_of_matmul_ceiling", "{:.0f} %", 100)),
                ("peak GB", _number("peak_bytes", "{:.1f}", 1e-9)),
                ("GB a view", _number("row_bytes", "{:.2f}", 1e-9)),
                ("expected GB a view", _number("row_bytes_expected", "{:.2f}", 1e-9)),
                ("first call, s", _number("first_call_seconds")),
            ),
        ),
        "images": ("ResMaster without image prompts, exact path", (("model", _text("what")), *IMAGE)),
    },
    "truth": {
        "formats": (
            "Picturebook's image against the CPU's in float32",
            (
                ("numbers", _text("dtype")),
                ("PSNR in dB", _number("psnr_db")),
                ("greatest difference, of 255", _text("greatest_levels")),
            ),
        ),
        "repeats": (
            "Again, and by other batches",
            (
                ("what", _text("what")),
                ("same bytes", lambda entry: {True: "yes", False: "NO"}.get(entry.get("same_bytes"), "")),
                ("PSNR in dB", _number("psnr_db")),
                ("greatest difference, of 255", _text("greatest_levels")),
            ),
        ),
        "out_of_memory": (
            "Memory that runs out",
            (
                ("provoked by", _text("provoked_by")),
                ("views per call that were tried", lambda entry: ", ".join(map(str, entry.get("tried", ())))),
                ("PSNR in dB against the smaller batch", _number("psnr_db")),
            ),
        ),
        "eight_bits": (
            "Images with 8-bit linear layers against those without",
            (
                ("layers", _text("layers")),
                ("least PSNR in dB", _number("least_db")),
                ("must reach", _number("gate_db")),
                ("passes", lambda entry: {True: "yes", False: "NO"}.get(entry.get("passes"), "")),
            ),
        ),
        "marked_tests": (
            "Tests that need a GPU",
            tuple((name, _text(name)) for name in ("passed", "failed", "errors", "left out")),
        ),
    },
    "training": {
        "parts": ("Training", (("part", _text("what")), ("seconds", _number("seconds", "{:.0f}")))),
        "measures": (
            "Its measures",
            (
                ("pack", _text("pack")),
                ("measure and value", lambda entry: _values(entry)),
            ),
        ),
    },
}
"""Step -> list of findings -> heading and columns."""


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in shares.items())


def _values(entry: Entry) -> str:
    return "; ".join(f"{name} {value:g}" for name, value in entry.items() if isinstance(value, (int, float)))


def _name(entry: Entry) -> str:
    return ", ".join(str(entry[label]) for label in LABELS if label in entry)


def _reason(error: str) -> str:
    """The line of a traceback that names the error: the last one that is not indented and begins with a class's
    name."""
    lines = error.strip().splitlines() or [""]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit|NotFound\w*)\b", line)]
    return (named or lines)[-1][:200]


def _gaps(entries: Iterable[Entry]) -> list[str]:
    """A line for each entry that holds no number, or an image that is none."""
    lines = []
    for entry in entries:
        if "error" in entry:
            lines.append(f"- {_name(entry)}: FAILED: {_reason(entry['error'])}")
        for key, word in (("skipped", "not measured"), ("left_out", "left out"), ("no_image", "no image came out")):
            if entry.get(key):
                lines.append(f"- {_name(entry)}: {word}: {entry[key]}")
    return lines


def _table(heading: str, columns: Sequence[Column], entries: Sequence[Entry]) -> list[str]:
    """A table of the entries that hold numbers, without columns that are empty throughout; the others below it."""
    shown = [each for each in entries if not {"error", "skipped", "left_out"} & set(each)]
    used = [(name, show) for name, show in columns if any(show(each) for each in shown)]
    lines = [f"**{heading}**", ""]
    if shown:
        lines += ["| " + " | ".join(name for name, _ in used) + " |", "|" + " --- |" * len(used)]
        lines += ["| " + " | ".join(show(each) for _, show in used) + " |" for each in shown] + [""]
    gaps = _gaps(entries)
    return lines + ([*gaps, ""] if gaps else [])


def markdown(content: dict[str, Any]) -> str:
    """All tables of one report, headed by what was measured on what, when and how."""
    about = content["about"]
    lines = [
        f"{about.get('device', 'No device')}, torch {about.get('torch')}, {about.get('date')}: "
        f"`{about.get('command')}`",
        "",
    ]
    if about.get("rehearsal"):
        lines += ["A rehearsal at toy sizes: these numbers mean nothing.", ""]
    for step, content_of in content["steps"].items():
        if content_of.get("status") != "done":
            lines += [f"Step {step}: {content_of.get('status')}: {_reason(content_of.get('error', ''))}", ""]
        for name, (heading, columns) in TABLES[step].items():
            if entries := content_of["found"].get(name):
                lines += _table(heading, columns, entries)
    return "\n".join(lines).rstrip()


def put(page: str, reports: Sequence[dict[str, Any]]) -> str:
    """`page` with the tables of `reports` between its two marks. Raises SystemExit where they are missing or a
    rehearsal's."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"the page must hold {BEGIN} and {END}, once each")
    if any(report["about"].get("rehearsal") for report in reports):
        raise SystemExit("a rehearsal's numbers mean nothing: give the report of a run on a GPU")
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + "\n\n".join(map(markdown, reports)) + "\n" + END + rest.split(END)[1]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tables", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("reports", type=Path, nargs="+", help="gpu.json of one or more runs")
    args = parser.parse_args(words)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.reports]
    args.page.write_text(put(args.page.read_text(encoding="utf-8"), reports), encoding="utf-8")


if __name__ == "__main__":
    main()
