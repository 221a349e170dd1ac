"""`upscale.colour_match` of every method: by the library, the stage and the command line; older datasets stay."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import resmaster_stages as rm
from resmaster_flows.cli.main import main
from resmaster_stages import high_res
from resmaster_stages.config.load import parse_config
from resmaster_stages.config.method import ColourMatch, Method, methods, with_method
from resmaster_stages.config.wrap import Axes
from resmaster_stages.dataset.sample import EncodedImage, Sample
from resmaster_stages.dataset.stages import hashes_of
from resmaster_stages.diffusion import colour_match
from resmaster_stages.diffusion.colour_match import colour_matched
from resmaster_stages.errors import ConfigError
from resmaster_stages.methods.upscale import upscale_image
from resmaster_stages.models.identity import Weights
from resmaster_stages.storage.images import encode_image
from tests.methods.common import DIFFUSION_METHODS, adapted, difference, settings, some_image

WAYS: tuple[ColourMatch, ...] = ("mean_std", "wavelet")


def hashes(**upscale: Any) -> dict[str, str]:
    return hashes_of(parse_config({"name": "d", "upscale": upscale}), Weights("m"))


@pytest.mark.parametrize("method", methods())
def test_without_it_a_method_keeps_its_identity_and_with_it_the_large_image_alone_changes(method: str) -> None:
    plain = Method.model_validate({"method": method})
    assert "colour_match" not in plain.identity()
    assert hashes(method=method, colour_match="none") == hashes(method=method)
    before, after = hashes(method=method), hashes(method=method, colour_match="wavelet")
    assert {stage for stage in before if before[stage] != after[stage]} == {"high_res", "quality"}
    assert with_method({"method": method, "colour_match": "wavelet"}, "lanczos")["colour_match"] == "wavelet"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("method", [each for each in DIFFUSION_METHODS if each in ("direct", "resmaster", "pixelrush")])
def test_the_finished_image_is_matched_and_nothing_before(method: str, how: ColourMatch) -> None:
    models = adapted()
    plain = upscale_image(models, some_image(), "a cat", config=settings(method))
    assert upscale_image(models, some_image(), "a cat", config=settings(method, colour_match="none")) == plain
    matched = upscale_image(models, some_image(), "a cat", config=settings(method, colour_match=how))
    assert matched.tobytes() == colour_matched(plain, some_image(), how).tobytes()
    assert difference(matched, plain) > 5


def test_images_between_are_matched_with_the_first_low_res_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, int], bytes, Axes]] = []

    def noted(image: Image.Image, low_res: Image.Image, how: ColourMatch, wraps: Axes) -> Image.Image:
        seen.append((image.size, low_res.tobytes(), wraps))
        return colour_matched(image, low_res, how, wraps)

    monkeypatch.setattr(colour_match, "colour_matched", noted)
    image = some_image()
    config = settings("multidiffusion", scale=4, via=[2], colour_match="wavelet", wrap="horizontal")
    upscale_image(adapted(), image, "a cat", config=config)
    assert seen == [(size, image.tobytes(), (False, True)) for size in ((128, 128), (256, 256))]


def test_the_stage_and_the_library_make_the_same_image(tmp_path: Path) -> None:
    image = some_image(40, 24)
    config = parse_config(
        {"name": "d", "upscale": {"method": "lanczos", "scale": 2, "colour_match": "mean_std"}, "image_format": "png"}
    )
    low_res = EncodedImage(encode_image(image, "png"), "png", {})
    (output,) = high_res.process(config, [Sample("k", 0, "a cat", "", 24, 40, 0, low_res=low_res)])
    files = output.finished().files
    assert json.loads(files["json"])["upscale"] == {"method": "lanczos", "scale": 2.0, "colour_match": "mean_std"}
    made = Image.open(io.BytesIO(files["png"]))
    by_library = rm.upscale(image, method="lanczos", scale=2, colour_match="mean_std")
    assert by_library.tobytes() == made.tobytes()
    means = [np.asarray(each, dtype=float).mean((0, 1)) for each in (made, image)]
    assert np.abs(means[0] - means[1]).max() < 0.5

    image.save(tmp_path / "in.png")
    (tmp_path / "config.yaml").write_text("name: d\nupscale: {method: lanczos, colour_match: mean_std}\n")
    words = ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--method", "lanczos", "--scale", "2"]
    for more in (["--colour-match", "mean_std"], ["--config", str(tmp_path / "config.yaml"), "--force"]):
        assert main([*words, *more]) == 0
        with Image.open(tmp_path / "out.png") as written:
            assert written.tobytes() == made.tobytes()


def test_another_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"upscale.colour_match: .*'none', 'mean_std' or 'wavelet'"):
        rm.upscale(some_image(), method="lanczos", colour_match="adain")
    with pytest.raises(SystemExit, match="2"):
        main(["upscale", "in.png", "out.png", "--colour-match", "adain"])
    assert "mean_std" in capsys.readouterr().err
