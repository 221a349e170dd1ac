"""The ComfyUI pack, in a stand-in for ComfyUI (comfy_stand_in.py): its contract, its workflows, and what they draw."""

import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import resmaster_stages as rm
from resmaster_stages.config import method as registry
from resmaster_stages.diffusion.autoencoder import encode
from resmaster_stages.diffusion.reference import to_tensor
from resmaster_stages.errors import ResMasterError, UserError
from resmaster_stages.methods.lanczos import Lanczos
from tests.checkout import ROOT
from tests.integrations.comfy_stand_in import (
    ComfyUI,
    InterruptProcessingException,
    LatentPreviewMethod,
    Prompt,
    inputs_of,
)
from tests.integrations.single_files import write
from tests.tiny_models import make_stable_diffusion

PACK = ROOT / "integrations" / "comfyui"
PROMPT = "a red house on a green meadow"
QUICK = {"method": "resmaster", "preset": "default", "scale": 1.5, "steps": 4, "guidance_scale": 0.0}
"""What a test's method node says: six views in three steps."""


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[ComfyUI]:
    with ComfyUI(tmp_path).with_pack(PACK) as comfy:
        photo = Image.effect_noise((128, 128), 60).convert("RGB")
        photo.paste((200, 30, 30), (20, 50, 90, 120))
        photo.save(tmp_path / "input" / "photo.png")
        yield comfy


def upscaling(**inputs: Any) -> Prompt:
    """A workflow: an image file through Upscale, with the embedded model. inputs: further ones of Upscale."""
    return {
        "image": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "model": node("ResMasterLoadModel", model="picturebook", dtype="auto", offload="auto"),
        "method": node("ResMasterMethod", **QUICK),
        "upscale": node(
            "ResMasterUpscale",
            **{"image": ["image", 0], "model": ["model", 0], "method": ["method", 0], "prompt": PROMPT, "seed": 7}
            | inputs,
        ),
        "save": node("SaveImage", images=["upscale", 0], filename_prefix="large"),
    }


def node(name: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": name, "inputs": {key: value for key, value in inputs.items() if value is not None}}


def pixels_of(comfy: ComfyUI, number: str) -> np.ndarray[Any, Any]:
    """The first output of a node as bytes [B, H, W, 3]."""
    (batch,) = comfy.outputs[number][0]
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() <= batch.max() <= 1
    return (batch * 255).round().to(torch.uint8).numpy()


def own(image: Image.Image, **values: Any) -> np.ndarray[Any, Any]:
    """What the library draws with the settings of `upscaling`."""
    settings: dict[str, Any] = {"scale": 1.5, "steps": 4, "seed": 7, **values}
    return (rm.upscale(image, PROMPT, output_type="np", **settings) * 255).round().astype(np.uint8)


def photo(comfy: ComfyUI) -> Image.Image:
    return Image.open(comfy.folder / "input" / "photo.png")


def test_every_node_keeps_the_contract(comfy: ComfyUI) -> None:
    assert len(comfy.names) == 11
    for name, display in comfy.names.items():
        kind = comfy.nodes[name]
        assert name.startswith("ResMaster")
        assert display.endswith("(ResMaster)")
        assert kind.CATEGORY == "ResMaster"
        assert kind.DESCRIPTION.endswith(".")
        outputs = len(kind.RETURN_TYPES)
        assert len(kind.RETURN_NAMES) == outputs
        assert len(getattr(kind, "OUTPUT_IS_LIST", kind.RETURN_TYPES)) == outputs
        known = inputs_of(kind)
        call = inspect.signature(getattr(kind(), kind.FUNCTION))
        call.bind(**dict.fromkeys(known))  # every input may be given
        call.bind(**{key: None for key, (_, _, required) in known.items() if required})  # and only those required
        for key, (wanted, options, _) in known.items():
            if isinstance(wanted, list):
                assert options.get("default", wanted[0] if wanted else None) in (wanted or [None]), (name, key)
            elif wanted in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"], (name, key)
            elif wanted == "STRING":
                assert isinstance(options["default"], str), (name, key)
            else:
                assert wanted in ("BOOLEAN", "IMAGE", "LATENT", "MASK", "MODEL", "CLIP", "VAE") or wanted.startswith(
                    "RESMASTER_"
                ), (name, key)


def test_methods_and_presets_are_those_of_the_registry(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Lanczos):
        method: Literal["mine"] = "mine"  # type: ignore[assignment]
        presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "mild": {}}

    monkeypatch.setattr(registry, "_METHODS", {**registry.methods(), "mine": Mine})
    known = inputs_of(comfy.nodes["ResMasterMethod"])
    assert known["method"][0] == list(registry.methods())
    assert known["method"][0][-1] == "mine"
    assert {"default", "faithful", "mild"} <= set(known["preset"][0])


def test_an_image_is_what_the_library_draws(comfy: ComfyUI) -> None:
    comfy.run(upscaling())
    (large,) = pixels_of(comfy, "upscale")
    assert np.array_equal(large, own(photo(comfy)))
    with Image.open(comfy.folder / "output" / "large_00001_.png") as saved:
        assert saved.size == (192, 192)
    assert comfy.shown[-1] == (3, 3)
    assert [done for done, _ in comfy.shown] == [1, 2, 3]


def test_a_batch_draws_each_image_with_a_seed_of_its_own(comfy: ComfyUI) -> None:
    class Two(comfy.nodes["LoadImage"]):  # type: ignore[name-defined, misc]
        def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
            one, mask = super().load_image(image)
            return torch.cat([one, one.flip(2)]), mask

    comfy.nodes["LoadImage"] = Two
    comfy.run(upscaling())
    first, second = pixels_of(comfy, "upscale")
    assert np.array_equal(first, own(photo(comfy)))
    assert np.array_equal(second, own(photo(comfy).transpose(Image.Transpose.FLIP_LEFT_RIGHT), seed=8))
    assert comfy.shown == [(number, 6) for number in range(1, 7)]


def test_the_user_can_stop_and_go_on(comfy: ComfyUI) -> None:
    comfy.stop_at = 1
    with pytest.raises(InterruptProcessingException):
        comfy.run(upscaling())
    assert comfy.shown == [(1, 3)]
    comfy.stop_at = None
    comfy.run(upscaling())
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy)))


def test_previews_are_shown_where_the_user_wants_them(comfy: ComfyUI) -> None:
    comfy.run(upscaling())
    assert comfy.previews == []
    comfy.args.preview_method = LatentPreviewMethod.Auto
    comfy.run(upscaling())
    assert [(kind, image.size, longest) for kind, image, longest in comfy.previews] == [("JPEG", (24, 24), 512)] * 3
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy)))


def test_a_prompt_becomes_an_image(comfy: ComfyUI) -> None:
    made = node("ResMasterGenerate", model=["model", 0], prompt=PROMPT, seed=3, settings="steps: 4")
    comfy.run(upscaling(image=["made", 0]) | {"made": made})
    (image,) = rm.generate(PROMPT, seed=3, steps=4, output_type="np")
    assert np.array_equal(pixels_of(comfy, "made")[0], (image * 255).round().astype(np.uint8))
    assert comfy.shown[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    made["inputs"]["settings"] = "seed: 3"
    with pytest.raises(UserError, match=r"unknown key 'low_res\.seed'"):
        comfy.run(upscaling(image=["made", 0]) | {"made": made})


def test_views_are_shown_images_of_the_users(comfy: ComfyUI) -> None:
    views = {
        "views": node("ResMasterViews", model=["model", 0], image=["image", 0], method=["method", 0]),
        "shown": node("ResMasterImagePrompts", images=["views", 0]),
    }
    comfy.run(upscaling(image_prompts=["shown", 0]) | views)
    cut = [Image.fromarray((view[0].numpy() * 255).round().astype(np.uint8)) for view in comfy.outputs["views"][0]]
    crops = pixels_of(comfy, "upscale")[0]
    assert np.array_equal(crops, own(photo(comfy), image_prompts=cut))
    near = np.abs(crops.astype(float) - own(photo(comfy))).mean()
    green = own(photo(comfy), image_prompts=[Image.new("RGB", (100, 60), "green")] * 4)
    far = np.abs(crops.astype(float) - green).mean()
    assert near < far / 4, "their own crops are what views are shown anyway"
    views["shown"]["inputs"]["images"] = ["image", 0]
    with pytest.raises(UserError, match=r"image_prompts: 1 given for 1 image\(s\) with 4 views; give 4"):
        comfy.run(upscaling(image_prompts=["shown", 0]) | views)


def test_the_library_says_what_is_wrong_with_image_prompts() -> None:
    image = Image.new("RGB", (128, 128), "red")
    with pytest.raises(UserError, match="image_prompts: 2 given for 4 views"):
        rm.upscale(image, scale=1.5, image_prompts=[image] * 2)
    with pytest.raises(UserError, match="image_prompts: 1 lists for 2 images; give one list per image"):
        rm.upscale([image, image], scale=1.5, image_prompts=[[image] * 4])
    with pytest.raises(UserError, match="image_prompts: method multidiffusion reads none as it is set"):
        rm.upscale(image, scale=1.5, method="multidiffusion", image_prompts=[image] * 4)


def test_a_latent_stands_for_its_image(comfy: ComfyUI) -> None:
    """ComfyUI hands on what a VAE gives, without the scale that the denoiser's latents have."""
    models = rm.load("picturebook")
    image = rm.generate(PROMPT, steps=10)[0]
    canvas = encode(models, to_tensor(image))
    comfy.nodes["Latent"].samples = models.base.from_canvas(canvas)  # type: ignore[attr-defined]
    assert not torch.equal(canvas, models.base.from_canvas(canvas))
    prompt = upscaling(image=None, latent=["latent", 0]) | {"latent": node("Latent")}
    comfy.run(prompt)
    by_latent = pixels_of(comfy, "upscale")[0].astype(float)
    image.save(comfy.folder / "input" / "photo.png")
    comfy.run(upscaling())
    by_image = pixels_of(comfy, "upscale")[0].astype(float)
    assert np.abs(by_latent - by_image).mean() < 6
    comfy.nodes["Latent"].samples = torch.zeros(1, 4, 16, 16)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="16 channels; decode it with its own VAE"):
        comfy.run(prompt)


def test_captions_of_another_packs_captioner_reach_their_views(comfy: ComfyUI) -> None:
    cut = {
        "views": node("ResMasterViews", model=["model", 0], image=["image", 0], method=["method", 0]),
        "captioner": node("EachBrightness", image=["views", 0]),
        "captions": node("ResMasterCaptions", captions=["captioner", 0]),
    }
    comfy.run(upscaling(captions=["captions", 0]) | cut)
    views, count, grid = comfy.outputs["views"]
    assert count == [4]
    assert grid == ["4 views of 128 x 128 px in 2 rows and 2 columns"]
    assert [tuple(view.shape) for view in views] == [(1, 128, 128, 3)] * 4
    texts = comfy.outputs["captioner"][0]
    assert len(set(texts)) == 4
    assert comfy.outputs["captions"][0] == [tuple(texts)]
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy), captions=texts))


def test_a_text_has_a_caption_a_line(comfy: ComfyUI) -> None:
    texts = ["a sky", "a roof", "a wall", "a door"]
    lines = {"captions": node("ResMasterCaptions", captions="\n".join(texts))}
    comfy.run(upscaling(captions=["captions", 0]) | lines)
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy), captions=texts))
    lines["captions"]["inputs"]["captions"] = "a sky\na roof"
    with pytest.raises(UserError, match=r"captions: 2 given for 1 image\(s\) with 4 views; give 4"):
        comfy.run(upscaling(captions=["captions", 0]) | lines)


@pytest.mark.parametrize("captioner", ["attention", "picturebook"])
def test_captions_are_written_by_the_model(comfy: ComfyUI, captioner: str) -> None:
    written = node(
        "ResMasterCaptionViews",
        model=["model", 0],
        image=["image", 0],
        method=["method", 0],
        prompt=PROMPT,
        captioner=captioner,
    )
    comfy.run(upscaling(captions=["captions", 0]) | {"captions": written})
    (captions,), texts = comfy.outputs["captions"]
    assert list(captions) == texts
    assert len(texts) == 4
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy), captions=captioner))


def test_a_transparent_image_lies_on_white_and_a_mask_says_where_detail_is(comfy: ComfyUI) -> None:
    method = node("ResMasterMethod", **{**QUICK, "method": "freescale", "settings": "{alpha: 3, alpha_elsewhere: 0.5}"})
    known = {**upscaling(detail=["image", 1]), "method": method}
    rgba = photo(comfy).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    rgba.save(comfy.folder / "input" / "photo.png")
    comfy.run(known)
    masked = pixels_of(comfy, "upscale")[0]
    del known["upscale"]["inputs"]["detail"]
    comfy.run(known)
    assert not np.array_equal(masked, pixels_of(comfy, "upscale")[0])


def test_a_method_without_a_model_needs_none(comfy: ComfyUI) -> None:
    prompt = upscaling(model=None) | {"method": node("ResMasterMethod", **{**QUICK, "method": "lanczos", "steps": 0})}
    del prompt["model"]
    comfy.run(prompt)
    large = np.asarray(rm.upscale(photo(comfy), method="lanczos", scale=1.5))
    assert np.array_equal(pixels_of(comfy, "upscale")[0], large)


def test_an_enlargement_is_measured(comfy: ComfyUI) -> None:
    measured = node("ResMasterMeasure", model=["model", 0], low_res=["image", 0], high_res=["upscale", 0])
    comfy.nodes["ResMasterMeasure"].OUTPUT_NODE = True  # type: ignore[attr-defined]
    comfy.run(upscaling() | {"measure": measured})
    (metrics,), _, (agreement,) = comfy.outputs["measure"]
    row = rm.measure(photo(comfy), Image.fromarray(pixels_of(comfy, "upscale")[0]))
    assert agreement == row["agreement_psnr"]
    assert f"agreement_psnr: {agreement:.4g}" in metrics.splitlines()


@pytest.fixture
def tiny(comfy: ComfyUI) -> Any:
    """A pipeline, whose JSON files and tokenizer lie in the folder `config`."""
    pipe = make_stable_diffusion()
    pipe.save_pretrained(comfy.folder / "config")
    for path in (comfy.folder / "config").rglob("*.safetensors"):
        path.unlink()
    return pipe


def single_file(comfy: ComfyUI, name: str = "ResMasterLoadCheckpoint", **inputs: Any) -> dict[str, Any]:
    config = str(comfy.folder / "config")
    return node(name, **{"dtype": "auto", "image_prompts": False, "config": config, **inputs})


def test_a_single_file_is_loaded_as_its_pipeline(comfy: ComfyUI, tiny: Any) -> None:
    write(tiny, comfy.folder / "checkpoints" / "tiny.safetensors")
    (comfy.folder / "checkpoints" / "old.ckpt").touch()
    assert inputs_of(comfy.nodes["ResMasterLoadCheckpoint"])["ckpt_name"][0] == ["tiny.safetensors"]
    load = single_file(comfy, ckpt_name="tiny.safetensors")
    comfy.run(upscaling() | {"model": load})
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy), model=tiny))
    words = node(
        "ResMasterCaptionViews", model=["model", 0], image=["image", 0], method=["method", 0], prompt="", captioner="x"
    )
    with pytest.raises(UserError, match=r"tiny.safetensors has no name .* other nodes must write the captions"):
        comfy.run(upscaling(captions=["words", 0]) | {"model": load, "words": words})
    load["inputs"]["image_prompts"] = True
    with pytest.raises(UserError, match="there is an adapter for SDXL, not for StableDiffusionPipeline; switch it off"):
        comfy.run(upscaling() | {"model": load})
    (comfy.folder / "checkpoints" / "tiny.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model tiny\.safetensors: cannot load it"):
        comfy.run(upscaling() | {"model": load})


def test_a_model_of_comfyui_is_taken_over(comfy: ComfyUI, tiny: Any) -> None:
    comfy.nodes["CheckpointLoaderSimple"].pipe = tiny  # type: ignore[attr-defined]
    (comfy.folder / "checkpoints" / "tiny.safetensors").touch()
    linked = {"model": ["comfy", 0], "clip": ["comfy", 1], "vae": ["comfy", 2]}
    take = single_file(comfy, "ResMasterTakeModel", **linked)
    comfy.run(upscaling() | {"comfy": node("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"), "model": take})
    assert np.array_equal(pixels_of(comfy, "upscale")[0], own(photo(comfy), model=tiny))
    assert list((comfy.folder / "temp").iterdir()) == []


def test_a_folder_of_comfyuis_diffusers_models_is_found_by_its_name(comfy: ComfyUI) -> None:
    make_stable_diffusion().save_pretrained(comfy.folder / "diffusers" / "mine")
    load = node("ResMasterLoadModel", model="mine", dtype="float32", offload="none", settings="native_px: 64")
    comfy.run(upscaling() | {"model": load})
    (loaded,) = comfy.outputs["model"][0]
    assert loaded.part == {
        "id": str(comfy.folder / "diffusers" / "mine"),
        "dtype": "float32",
        "offload": "none",
        "native_px": 64,
    }
    assert loaded.models.dtype == torch.float32


def test_comfyuis_models_leave_the_device_first(comfy: ComfyUI, monkeypatch: pytest.MonkeyPatch) -> None:
    comfy.run(upscaling())
    assert comfy.emptied == 0, "on a CPU nothing has to move"
    upscale = comfy.nodes["ResMasterUpscale"]
    host = inspect.getmodule(inspect.unwrap(upscale.upscale).__globals__["at_work"])
    left: list[torch.device] = []
    monkeypatch.setattr(host, "has_own_memory", lambda device: True)
    monkeypatch.setattr(host, "occupy", left.append)
    comfy.run(upscaling())
    assert comfy.emptied == 2, "once to load, once to upscale"
    assert left == [torch.device("cpu")] * 2, "and this project's models leave it at the end"


@pytest.mark.parametrize(
    ("method", "mistake"),
    [
        ({"preset": "rectifiedhr"}, "rectifiedhr"),
        ({"scale": 0.5}, "scale: Input should be greater than or equal to 1"),
        ({"settings": "shift_stopp: 1"}, "unknown key 'upscale.shift_stopp' (did you mean 'shift_stop'?)"),
        ({"settings": "- a\n- b"}, "settings: there are no keys; write one `key: value` a line"),
        ({"settings": "a: [1"}, "settings: line 1 is no YAML"),
        ({"method": "lanczos"}, "unknown key 'upscale.steps'"),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(comfy: ComfyUI, method: dict[str, Any], mistake: str) -> None:
    prompt = upscaling() | {"method": node("ResMasterMethod", **{**QUICK, **method})}
    (told,) = comfy.mistakes(prompt)
    assert mistake in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("inputs", "mistake"),
    [
        ({"model": None}, "method resmaster needs a base model; connect one to `model`"),
        ({"image": None}, "connect either an image or a latent to Upscale"),
        ({"image": None, "latent": ["latent", 0], "model": None}, "connect one to `model`"),
        ({"latent": ["latent", 0]}, "connect either an image or a latent to Upscale"),
        ({"detail": ["image", 1]}, "a detail mask, which only method freescale reads"),
    ],
)
def test_a_mistake_is_one_sentence(comfy: ComfyUI, inputs: dict[str, Any], mistake: str) -> None:
    comfy.nodes["Latent"].samples = torch.zeros(1, 16, 16, 16)  # type: ignore[attr-defined]
    prompt = upscaling(**inputs) | {"latent": node("Latent")}
    with pytest.raises(ResMasterError) as told:
        comfy.run(prompt)
    assert mistake in str(told.value)
    assert "\n" not in str(told.value)


def test_the_package_says_what_it_needs() -> None:
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    library = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [f"{library['name']}>={library['version']}"]
    assert project["project"]["dependencies"] == needed
    assert (PACK / "requirements.txt").read_text().split() == needed
    assert project["project"]["license"] == library["license"]
    assert {"PublisherId", "DisplayName"} <= set(project["tool"]["comfy"])


def test_the_readme_names_every_node_and_workflow(comfy: ComfyUI) -> None:
    text = (PACK / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ", text, flags=re.MULTILINE)
    assert [f"{row} (ResMaster)" for row in rows if row[0].isupper() and row not in ("Node", "Workflow")] == [
        *sorted(comfy.names.values(), key=lambda name: rows.index(name.removesuffix(" (ResMaster)")))
    ]
    assert {f"`{path.stem}`" for path in (PACK / "example_workflows").glob("*.json")} == {
        row for row in rows if row.startswith("`")
    }
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (PACK / link).exists(), link


def as_prompt(path: Path) -> Prompt:
    """A workflow as ComfyUI's page sends it: the values of widgets, and the links, by their names."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    links = {number: [str(source), place] for number, source, place, *_ in graph["links"]}
    prompt = {}
    for each in graph["nodes"]:
        values, inputs = iter(each.get("widgets_values", ())), {}
        for place in each["inputs"]:
            if place["type"] == "IMAGEUPLOAD":  # a button
                next(values)
            elif "widget" in place:
                inputs[place["name"]] = next(values)
                if place["name"] == "seed":
                    assert next(values) == "fixed"  # what becomes of the seed after a run
            if place["link"] is not None:
                inputs[place["name"]] = links[place["link"]]
        assert list(values) == []
        prompt[str(each["id"])] = {"class_type": each["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_the_example_workflows_run(comfy: ComfyUI, tiny: Any, path: Path) -> None:
    """With a small model in place of SDXL, on less."""
    comfy.nodes["CheckpointLoaderSimple"].pipe = tiny  # type: ignore[attr-defined]
    (comfy.folder / "checkpoints" / "sd_xl_base_1.0.safetensors").touch()
    photo(comfy).save(comfy.folder / "input" / "example.png")
    prompt = as_prompt(path)
    smaller = {
        "ResMasterLoadModel": {"model": "picturebook"},
        "ResMasterMethod": {"scale": 1.5, "steps": 4},
        "ResMasterTakeModel": {"image_prompts": False, "config": str(comfy.folder / "config")},
        "ResMasterGenerate": {"settings": "steps: 4"},
    }
    assert comfy.mistakes(prompt) == [], "also as it is"
    for each in prompt.values():
        each["inputs"] |= smaller.get(each["class_type"], {})
    comfy.run(prompt)
    (large,) = (comfy.folder / "output").iterdir()
    with Image.open(large) as image:
        assert image.size == ((96, 96) if path.stem == "latent-and-model" else (192, 192))


def test_there_is_a_workflow_for_each_way_in() -> None:
    used = {
        each["class_type"] for path in (PACK / "example_workflows").glob("*.json") for each in as_prompt(path).values()
    }
    assert {"ResMasterLoadModel", "ResMasterTakeModel", "ResMasterCaptionViews", "ResMasterImagePrompts"} <= used
