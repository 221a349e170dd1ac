"""Lays out the page, and connects its buttons to `Work`. The only module that knows Gradio."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import gradio as gr
from PIL import Image

from resmaster_flows.app.work import Asked, Made, Work
from resmaster_stages.config.method import DEFAULT, Method, methods
from resmaster_stages.config.model import SDXL
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.metrics import METRICS
from resmaster_stages.models.identity import PICTUREBOOK
from resmaster_stages.redaction import one_line

MODELS = (PICTUREBOOK, str(SDXL["id"]))
"""The models that the page offers. Others can be typed."""
CAPTIONS = ("auto", "prompt", "attention")
"""The sources of captions that the page offers. The name of a captioner can be typed."""
COMMON = ("method", "preset", "scale", "steps", "guidance_scale", "negative_prompt")
"""The settings that have fields of their own."""
UNSET = "by the preset"
"""What an empty field shows."""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""Fonts of the reader's machine: the page loads nothing from elsewhere."""
INTRO = (
    "# ResMaster\n"
    "Enlarges an image with a diffusion model. **picturebook** is the embedded model: it needs no download and no GPU, "
    "and knows only a small world of houses, trees, animals and boats. Photos need a model such as SDXL, and a GPU. "
    "Empty fields take the values of the method's preset."
)


def page(work: Work, model: str = PICTUREBOOK) -> gr.Blocks:
    """The page. model: the name of the model that is chosen first."""
    with gr.Blocks(title="ResMaster", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                asked, make = _fields(model)
                with gr.Row():
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                    start = gr.Button("Upscale", variant="primary", elem_id="start")
            with gr.Column(scale=3, min_width=340):
                status = gr.Markdown("", elem_id="status")
                slider = gr.ImageSlider(
                    label="Left: the image, stretched. Right: the result",
                    interactive=False,
                    max_height=900,
                    format="png",
                )
                file = gr.DownloadButton("Save the result (PNG)", interactive=False)
                metrics = gr.Markdown("", elem_id="metrics")
        _connect(work, asked, (make, stop, start), (status, slider, file, metrics))
    return blocks


def _fields(model: str) -> tuple[dict[str, Any], gr.Button]:
    """Field of `Asked` -> the component that holds it; and the button that makes an image."""
    known = methods()
    asked: dict[str, Any] = {
        "image": gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], image_mode=None, height=260),
        "prompt": gr.Textbox(label="Prompt: what the image shows", lines=2),
    }
    make = gr.Button("Make an image from the prompt", size="sm", elem_id="make")
    asked["model"] = gr.Dropdown(
        [*dict.fromkeys((model, *MODELS))],
        value=model,
        label="Model",
        info="picturebook, a hub id, or a folder",
        allow_custom_value=True,
    )
    with gr.Row():
        asked["method"] = gr.Dropdown(list(known), value=DEFAULT, label="Method", min_width=170, elem_id="method")
        asked["preset"] = gr.Dropdown(list(known[DEFAULT].presets), value="default", label="Preset", min_width=130)
        asked["scale"] = gr.Number(value=4, minimum=1, maximum=64, label="Scale", min_width=80, elem_id="scale")
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            asked["steps"] = gr.Textbox(label="Steps", placeholder=UNSET, min_width=80, elem_id="steps")
            asked["guidance_scale"] = gr.Textbox(label="Guidance scale", placeholder=UNSET, min_width=80)
            asked["seed"] = gr.Number(value=0, precision=0, minimum=0, label="Seed", min_width=80)
        asked["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder=UNSET)
        asked["captions"] = gr.Dropdown(
            list(CAPTIONS),
            value="auto",
            label="Captions of the views",
            info="auto, prompt, attention, or the name of a captioner",
            allow_custom_value=True,
        )
        asked["further"] = gr.Code(language="yaml", label="Further settings, as `key: value` lines", lines=3)
        meaning = gr.Markdown(settings_of(DEFAULT))
    asked["method"].change(_chosen, asked["method"], [asked["preset"], meaning], show_progress="hidden")
    return asked, make


def _chosen(name: str) -> tuple[Any, str]:
    """The presets and the settings of a method."""
    presets = list(methods()[name].presets)
    return gr.Dropdown(choices=presets, value=presets[0]), settings_of(name)


def settings_of(name: str) -> str:
    """What a method is, and the settings that have no field of their own, as Markdown."""
    method = methods()[name]
    about = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    return "\n".join((f"**{name}**: {about}", "", *_settings(method)))


def _settings(method: type[Method]) -> Iterator[str]:
    """A line for each setting that has no field of its own: name, default, description."""
    chosen = method(method=method.model_fields["method"].default)
    for key, about in method.model_fields.items():
        if key not in COMMON:
            value = chosen.model_dump(mode="json")[key]
            shown = "" if isinstance(value, dict) else f" ({json.dumps(value)})"
            yield f"- `{key}`{shown}: {' '.join((about.description or '').split())}"


def _connect(work: Work, asked: Mapping[str, Any], buttons: tuple[Any, Any, Any], results: tuple[Any, ...]) -> None:
    """Connect the buttons. Only one request is at work at a time, whoever asks."""
    make, stop, start = buttons
    status, slider, file, metrics = results

    def upscale(*values: Any) -> Iterator[dict[Any, Any]]:
        yield {stop: gr.Button(interactive=True), start: gr.Button(interactive=False), metrics: ""}
        ended = {stop: gr.Button(interactive=False), start: gr.Button(interactive=True)}
        try:
            request = _asked(dict(zip(asked, values)))
            for now in _while_at_work(work, request):
                if isinstance(now, Made):
                    made = now
                else:
                    line, preview = now
                    yield {status: line} | ({slider: (preview, preview)} if preview else {})
        except ResMasterError as error:
            yield {**ended, status: f"**Not done:** {one_line(error)}"}
        except Exception:
            yield {**ended, status: "**Not done:** an error of the program; the terminal shows it"}
            raise
        else:
            pair = (made.low_res.resize(made.high_res.size, Image.Resampling.LANCZOS), made.high_res)
            done = {slider: pair, file: gr.DownloadButton(value=str(made.file), interactive=True)}
            yield {**ended, **done, status: _line(request, made), metrics: _table(made)}

    def generate(prompt: str, model: str, seed: int) -> dict[Any, Any]:
        try:
            return {asked["image"]: str(work.generate(prompt, model, seed)), status: ""}
        except ResMasterError as error:
            return {status: f"**Not done:** {one_line(error)}"}

    everything = [stop, start, *results]
    start.click(upscale, list(asked.values()), everything, concurrency_id="work", show_progress="hidden")
    make.click(
        generate,
        [asked["prompt"], asked["model"], asked["seed"]],
        [asked["image"], status],
        concurrency_id="work",
        show_progress_on=[asked["image"]],
    )
    stop.click(work.stop, queue=False, show_progress="hidden")


def _asked(values: Mapping[str, Any]) -> Asked:
    """What the fields say. Raises UserError. Gradio gives None for an empty text."""
    texts = ("prompt", "negative_prompt", "further")
    given = {name: values[name] or "" for name in texts}
    numbers = {
        "steps": number("Steps", values["steps"], int),
        "guidance_scale": number("Guidance scale", values["guidance_scale"], float),
    }
    return Asked(**{**values, **given, **numbers, "seed": values["seed"] or 0})


def number(label: str, text: str | None, kind: type[int] | type[float]) -> Any:
    """The number that a field holds; None for an empty field. Raises UserError."""
    if not (text or "").strip():
        return None
    try:
        return kind(str(text))
    except ValueError:
        raise UserError(f"{label}: {text!r} is no number; give one, or leave the field empty") from None


def _while_at_work(work: Work, request: Asked) -> Iterator[tuple[str, Image.Image | None] | Made]:
    """What is done now, again and again, and the result at the end. Raises what the request raises."""
    said: SimpleQueue[tuple[str, Image.Image | None] | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(work.upscale, request, lambda line, preview: said.put((line, preview)))
        made.add_done_callback(lambda _: said.put(None))
        while now := said.get():
            yield now
        yield made.result()


def _line(asked: Asked, made: Made) -> str:
    """One sentence on a result."""
    size = " to ".join(f"{image.width} x {image.height} px" for image in (made.low_res, made.high_res))
    begin = "Stopped, unfinished: " if made.stopped else ""
    return f"{begin}{asked.method}: {size} in {made.seconds:.1f} s (with loading the model)"


def _table(made: Made) -> str:
    """The metrics of a result, as Markdown."""
    rows = [
        f"| {column.heading} | {column.form.format(made.metrics[column.name])} | {column.meaning} |"
        for metric in METRICS
        for column in metric.columns
        if column.label and isinstance(made.metrics.get(column.name), int | float)
    ]
    flags = ", ".join(made.metrics.get("flags", ())) or "none"
    return "\n".join((f"Flags: {flags}", "", "| Metric | Value | Meaning |", "|---|---|---|", *rows))
