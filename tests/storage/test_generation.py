"""Prompts and seeds that other programs have written into image files, and files made to harm whoever reads them."""

import io
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from resmaster_stages.storage import generation as module
from resmaster_stages.storage.generation import Generation, read_generation
from resmaster_stages.storage.images import encode_image
from resmaster_stages.storage.labels import Label, parameters

A1111 = """a red barn, (wide:1.2) <lora:hay:0.8>
second line
Negative prompt: fog,
rain
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 3965811294, Size: 512x512, Model hash: ab12, Model: sd15
Template: a {red|blue} barn"""
EXPECTED = Generation("a red barn, (wide:1.2) <lora:hay:0.8>\nsecond line", "fog,\nrain", 3965811294)


def png(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text, zip=len(text) > 1000)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def with_exif(kind: str, comment: bytes = b"", **tags: str) -> bytes:
    exif = Image.Exif()
    if comment:
        exif.get_ifd(0x8769)[0x9286] = comment
    for name, value in tags.items():
        exif[{"make": 0x010F, "model": 0x0110}[name]] = value
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


def graph(**changes: object) -> dict[str, object]:
    """What ComfyUI writes for its first example."""
    nodes = {
        "3": ("KSampler", {"seed": 42, "steps": 20, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0]}),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5.ckpt"}),
        "6": ("CLIPTextEncode", {"text": "a red barn", "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "fog", "clip": ["4", 1]}),
        "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
    }
    made = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    return {**made, **{name.strip("_"): node for name, node in changes.items()}}


def node(**inputs: object) -> dict[str, object]:
    return {"class_type": "Any", "inputs": inputs}


def circle(one: str, other: str) -> dict[str, object]:
    return {one: node(conditioning=[other, 0]), other: node(conditioning=[one, 0])}


def test_the_text_of_a1111_in_a_png():
    assert read_generation(png(parameters=A1111)) == EXPECTED


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "PNG"])
@pytest.mark.parametrize("code", ["utf-16-be", "utf-16-le"])
def test_the_text_of_a1111_in_exif(kind, code):
    """piexif, and so A1111, writes big-endian; other programs write in the order of the file."""
    data = with_exif(kind, b"UNICODE\0" + A1111.encode(code))
    assert read_generation(data) == EXPECTED
    for mark in (b"ASCII\0\0\0", bytes(8), b""):
        assert read_generation(with_exif(kind, mark + A1111.encode())) == EXPECTED


@pytest.mark.parametrize("image_format", ["png", "webp", "avif", "jxl"])
def test_what_this_project_writes_is_read(image_format):
    text = parameters("ein Häuschen 🏠", "fog", {"Steps": 3, "Seed": 2**63 - 1})
    data = encode_image(Image.new("RGB", (8, 8)), image_format, 100, Label("trainedAlgorithmicMedia", parameters=text))
    assert read_generation(data) == Generation("ein Häuschen 🏠", "fog", 2**63 - 1)


@pytest.mark.parametrize(
    "comment", [b"Screenshot", b"ASCII\0\0\0My holiday. Steps: many", b"\0" * 40, b"UNICODE\0\xd8\x00"]
)
def test_comments_of_cameras_and_people_are_no_prompts(comment):
    assert read_generation(with_exif("JPEG", comment)) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a barn\nSteps: 20, Seed: 1", Generation("a barn", "", 1)),
        ("a barn\nSteps: 20", Generation("a barn")),
        ("Steps: 20, Seed: 1", None),
        ("\nNegative prompt: fog\nSteps: 20, Seed: 1", None),
        ("a\nSteps: 7, she said\nNegative prompt: x\nSteps: 20, Seed: 1", Generation("a\nSteps: 7, she said", "x", 1)),
        ("a barn\nSteps: 20, Seed: 99999999999999999999", Generation("a barn")),
        ("just words", None),
    ],
)  # fmt: skip
def test_texts_like_those_of_a1111(text, expected):
    assert read_generation(png(parameters=text)) == expected


def test_comfyuis_graph():
    assert read_generation(png(prompt=json.dumps(graph()))) == Generation("a red barn", "fog", 42)
    for tags in ({"make": "prompt:" + json.dumps(graph())}, {"model": "Prompt:" + json.dumps(graph())}):
        assert read_generation(with_exif("WEBP", **tags)) == Generation("a red barn", "fog", 42)


@pytest.mark.parametrize(
    "changes",
    [
        {"_6": node(text=["20", 0]), "_20": node(string="a red barn")},
        {"_6": node(text_g="a red barn", text_l="other")},
        {"_6": node(clip_l="other", t5xxl="a red barn", guidance=3.5)},
        {"_6": node(conditioning=["21", 0]), "_21": node(conditioning_1=["22", 0]), "_22": node(text="a red barn")},
        {
            "_3": node(seed=42, positive=["30", 0], negative=["30", 1]),
            "_30": node(positive=["6", 0], negative=["7", 0], control_net=["31", 0]),
        },
        {"_3": node(noise_seed=42, positive=["6", 0], negative=["7", 0])},
        {"_3": node(seed=["32", 0], positive=["6", 0], negative=["7", 0]), "_32": node(value=42)},
        {
            "_3": node(noise=["33", 0], guider=["34", 0], sampler=["35", 0]),
            "_33": node(noise_seed=42),
            "_34": node(positive=["6", 0], negative=["7", 0], cfg=8),
        },
        {"_2": node(seed=1, positive=["99", 0], negative=["7", 0])},
    ],
    ids=[
        "linked text",
        "sdxl",
        "flux",
        "changed conditions",
        "controlnet",
        "advanced",
        "linked seed",
        "custom",
        "empty",
    ],
)
def test_graphs_of_other_nodes(changes):
    assert read_generation(png(prompt=json.dumps(graph(**changes)))) == Generation("a red barn", "fog", 42)


def test_a_guider_without_negative_prompt():
    changes = {
        "_3": node(noise=["33", 0], guider=["34", 0]),
        "_33": node(noise_seed=5),
        "_34": node(conditioning=["6", 0]),
    }
    assert read_generation(png(prompt=json.dumps(graph(**changes)))) == Generation("a red barn", "", 5)


def test_the_json_of_other_programs():
    invoke = {"positive_prompt": "a barn", "negative_prompt": "fog", "seed": 7}
    assert read_generation(png(invokeai_metadata=json.dumps(invoke))) == Generation("a barn", "fog", 7)
    swarm = {"sui_image_params": {"prompt": "a barn", "negativeprompt": "fog", "seed": 7}}
    assert read_generation(png(parameters=json.dumps(swarm))) == Generation("a barn", "fog", 7)
    fooocus = {"prompt": "a barn", "negative_prompt": "fog", "seed": "7", "metadata_scheme": "fooocus"}
    assert read_generation(png(parameters=json.dumps(fooocus))) == Generation("a barn", "fog", 7)


def test_a1111_comes_before_comfyui():
    data = png(prompt=json.dumps(graph()), parameters="a barn\nSteps: 1, Seed: 1")
    assert read_generation(data) == Generation("a barn", "", 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"3": ' + "9" * 5000 + "}",
        json.dumps({"3": node(seed=1, positive=["3", 0], negative=["3", 0])}),
        json.dumps({"3": node(seed=1, positive=["6", 0]), **circle("6", "7")}),
        json.dumps({"3": node(seed=1, positive=[[], 0]), "4": None, "5": {"inputs": 7}}),
        json.dumps({"3": node(seed=1, positive="x")}),
        json.dumps({"3": node(seed=1, positive=[{"a": 1}, 0])}),
        json.dumps({"3": node(seed=1, positive=[True, 0])}),
        json.dumps({"3": node(seed=1, positive=["6", 0]), "6": node(text=["7", 0]), "7": node(text=[])}),
    ],
)
def test_hostile_graphs_say_nothing(text):
    assert read_generation(png(prompt=text)) is None


def test_a_long_way_through_a_graph_ends():
    chain = {str(number): node(conditioning=[str(number + 1), 0]) for number in range(10, 5_000)}
    data = png(prompt=json.dumps({"3": node(seed=1, positive=["10", 0]), **chain, "5000": node(text="far")}))
    assert read_generation(data) is None


def test_many_samplers_with_long_ways_cost_little(monkeypatch):
    looks = []
    real = module._Graph.inputs
    monkeypatch.setattr(module._Graph, "inputs", lambda graph, link: looks.append(1) or real(graph, link))
    chain = {str(number): node(conditioning=[str(number + 1), 0]) for number in range(2_000)}
    samplers = {f"s{number}": node(seed=1, positive=["0", 0]) for number in range(2_000)}
    assert read_generation(png(prompt=json.dumps({**samplers, **chain}))) is None
    assert len(looks) < 2 * module.MOST_SAMPLERS * (module.MOST_STEPS + 10)


def test_the_first_that_holds_a_prompt_counts():
    data = png(parameters="\nNegative prompt: fog\nSteps: 20, Seed: 1", prompt=json.dumps(graph()))
    assert read_generation(data) == Generation("a red barn", "fog", 42)


def test_long_texts_are_not_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXT_CHARACTERS", 200)
    assert read_generation(png(parameters="x" * 300 + "\nSteps: 1, Seed: 1")) is None
    assert read_generation(png(prompt=json.dumps(graph()))) is None
    assert read_generation(with_exif("JPEG", b"UNICODE\0" + ("x" * 300 + "\nSteps: 1").encode("utf-16-be"))) is None
    assert read_generation(png(parameters="short\nSteps: 1, Seed: 1")) == Generation("short", "", 1)


def test_a_text_that_unpacks_to_gigabytes_is_not_unpacked():
    """zTXt: a few kilobytes that stand for 100 MB."""
    content = b"parameters\0\0" + zlib.compress(bytes(100 * 2**20), 9)
    whole = len(content).to_bytes(4, "big") + b"zTXt" + content + zlib.crc32(b"zTXt" + content).to_bytes(4, "big")
    plain = png()
    assert read_generation(plain[:33] + whole + plain[33:]) is None


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_files_say_nothing_or_something_and_raise_nothing(junk, place):
    for data in (png(parameters=A1111), with_exif("JPEG", b"UNICODE\0" + A1111.encode("utf-16-be"))):
        found = read_generation(data[:place] + junk + data[place + len(junk) :])
        assert found is None or isinstance(found.prompt, str)
