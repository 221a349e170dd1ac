"""The tables of docs/bases.md and docs/methods.md say of each family what its code says."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

from resmaster_stages.config.method import method_class, methods
from resmaster_stages.config.model import ModelConfig
from resmaster_stages.methods.settings import Diffusion
from resmaster_stages.models.bases import FAMILIES
from resmaster_stages.models.bases.base import Family
from resmaster_stages.models.licences import KNOWN
from tests.checkout import ROOT
from tests.methods.common import some_image
from tests.tiny_transformers import make_flux

PAGE, METHODS = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("bases", "methods"))
DIFFUSERS = [name for name in dir(diffusers) if name.endswith("Pipeline")]
OURS: Mapping[str, Family] = {
    family.name: family for family in FAMILIES if any(re.fullmatch(family.pipelines, name) for name in DIFFUSERS)
}
"""Name -> family of models that users have: none of tests, and not the embedded model in another description."""


def table(page: str, head: str) -> list[dict[str, str]]:
    """The rows of the first table whose head begins with `head`, by the names of their columns."""
    found = re.search(rf"^\| {re.escape(head)} \|.*\n(?:\|.*\n)+", page, re.MULTILINE)
    assert found is not None
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_every_family_is_in_the_tables() -> None:
    assert {row["Family"] for row in table(PAGE, "Family")} == OURS.keys()
    assert {row["Family"] for row in table(PAGE, "Model")} == OURS.keys()
    columns = [name for name in table(METHODS, "method")[0] if name != "method"]
    assert sorted(", ".join(columns).split(", ")) == sorted(OURS)


def test_image_prompts_are_offered_where_a_family_has_them() -> None:
    for row in table(PAGE, "Family"):
        able = "image_prompts" in OURS[row["Family"]].abilities
        assert (row["Image prompts"] != "no") is able, row["Family"]


def test_licences_are_those_of_the_table_in_the_code() -> None:
    for row in table(PAGE, "Model"):
        assert KNOWN[row["Model"].strip("`").lower()] == row["Licence"]


@pytest.mark.parametrize("row", table(METHODS, "method"), ids=lambda row: row["method"])
def test_a_method_runs_on_a_family_as_the_table_says(row: dict[str, str]) -> None:
    method = row.pop("method")
    for names, cell in row.items():
        settings = yaml.safe_load(found[1]) if (found := re.search(r"`(.*)`", cell)) else {}
        plain, told = (method_class(method).model_validate({"method": method, **each}) for each in ({}, settings))
        assert isinstance(plain, Diffusion)
        assert isinstance(told, Diffusion)
        for name in names.split(", "):
            abilities = OURS[name].abilities
            assert (cell == "yes") is (plain.needs().keys() <= abilities), f"{method} on {name}"
            assert cell == "no" or told.needs().keys() <= abilities, f"{method} on {name}"
            assert cell != "no" or f"method {method}" in plain.needs().values()  # the method itself, and no setting


def test_all_methods_that_denoise_are_in_the_table() -> None:
    ours = {name for name, each in methods().items() if each.__module__.startswith("resmaster_stages.")}
    denoising = {name for name in ours if issubclass(methods()[name], Diffusion)}
    assert {row["method"] for row in table(METHODS, "method")} == denoising


PUBLISHED = {
    "FLUX.1-dev": ("FluxPipeline", {"guidance_embeds": True}, {}),
    "FLUX.1-schnell": ("FluxPipeline", {"guidance_embeds": False}, {}),
    "Chroma": ("ChromaPipeline", {}, {}),
    "FLUX.2-dev": ("Flux2Pipeline", {"guidance_embeds": True}, {}),
    "FLUX.2-klein": ("Flux2KleinPipeline", {}, {"is_distilled": True}),
    "FLUX.2-klein-base": ("Flux2KleinPipeline", {}, {"is_distilled": False}),
    "Stable Diffusion 3": ("StableDiffusion3Pipeline", {}, {}),
    "Stable Diffusion 3.5": ("StableDiffusion3Pipeline", {"qk_norm": "rms_norm"}, {}),
    "Stable Diffusion 3.5 turbo": ("StableDiffusion3Pipeline", {"qk_norm": "rms_norm"}, {}),
    "PixArt": ("PixArtSigmaPipeline", {}, {}),
    "Z-Image": ("ZImagePipeline", {}, {}),
    "Z-Image-Turbo": ("ZImagePipeline", {}, {}),
    "Qwen-Image": ("QwenImagePipeline", {}, {}),
}
"""Name in the table of settings -> pipeline, what tells the variant in the transformer's and the pipeline's files."""


@pytest.mark.parametrize("row", table(PAGE, "Model | steps"), ids=lambda row: row["Model"])
def test_settings_are_those_that_a_family_recommends(row: dict[str, str], tmp_path: Path) -> None:
    name = row["Model"].split(", ")[0]
    if name == "SDXL":  # the defaults of the configuration
        return
    pipeline, transformer, index = PUBLISHED[name]
    family = next(each for each in OURS.values() if re.fullmatch(each.pipelines, pipeline))
    folder = tmp_path / name
    for file, values in (
        ("model_index.json", {"_class_name": pipeline, **index}),
        ("transformer/config.json", transformer),
        ("vae/config.json", {}),
        ("scheduler/scheduler_config.json", {}),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(values))
    sampling = family.sampling(ModelConfig(id=str(folder)))
    assert (str(sampling.steps), f"{sampling.guidance_scale:g}") == (row["steps"], row["guidance_scale"])


def test_the_pipeline_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, but with a tiny model, on a CPU, in two steps."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    make_flux().save_pretrained(tmp_path / "flux")
    some_image(64, 64).save(tmp_path / "photo.png")
    asked: list[str] = []
    monkeypatch.setattr(diffusers.FluxPipeline, "load_lora_weights", lambda pipe, name: asked.append(name))
    monkeypatch.chdir(tmp_path)
    smaller = {"black-forest-labs/FLUX.1-dev": "flux", '"cuda"': '"cpu"', "steps=28": "steps=2", "scale=4": "scale=2"}
    for before, after in smaller.items():
        assert before in block
        block = block.replace(before, after)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/bases.md", "exec"), names)
    assert names["image"].size == (128, 128)
    assert asked == ["my-lora.safetensors"]
