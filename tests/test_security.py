"""Whole builds with a canary in every place a secret may come from, and pages that show hostile text in a browser's
eyes.

What files from outside may do is in tests/storage/test_untrusted.py, models in tests/models/test_untrusted_weights.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import html5lib
import pyarrow.parquet as pq
import pytest
import yaml
from botocore.exceptions import EndpointConnectionError

from resmaster_stages.config.load import parse_config
from resmaster_stages.errors import ConfigError
from resmaster_stages.models.identity import Weights
from resmaster_stages.publish.manifest import write_manifest
from resmaster_stages.publish.page import ReportSample, render_report
from resmaster_stages.runner.run import run_stage
from resmaster_stages.storage.store_errors import explained
from tests.checkout import PYTHONPATH
from tests.fake_stages import FAKES, planned, png
from tests.server.conftest import Stack, wait

CANARY = "canary9f3b"

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/se+cret",
    "AWS_SESSION_TOKEN": f"{CANARY}-session",
    "AWS_ENDPOINT_URL": f"http://{CANARY}:{CANARY}@127.0.0.1:9",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "HF_TOKEN": f"hf_{CANARY}",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}-2",
    "PREFECT_API_AUTH_STRING": f"admin:{CANARY}",
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",  # the name of an account, no secret
}

BUILD = """
import os, sys

from resmaster_flows.cli.main import main
from resmaster_stages.errors import SampleError, ShardError
from resmaster_stages.dataset.sample import Output
from resmaster_stages.dataset.stages import STAGES
from resmaster_tasks.stages import stage_task
from tests import fake_stages
from tests.standin_cli import install

SECRET = ", ".join(os.environ[name] for name in sys.argv.pop().split(","))


def leaky(config, samples):
    # errors that quote their surroundings, as libraries do: of one sample, of a shard, and one that nobody expected
    prompts = [sample.prompt for sample in samples]
    for error in (RuntimeError, ShardError):
        if error.__name__ in prompts:
            raise error(f"refused: {SECRET} at https://me:canary9f3b@host/x")
    for output in fake_stages.low_res(config, samples):
        yield Output(output.key, error=SampleError(f"refused: {SECRET}")) if output.error else output


for task in map(stage_task, STAGES):
    task.retries = 0
install({**fake_stages.FAKES, "low_res": leaky})
sys.exit(main())
"""


def texts(folder: Path) -> dict[str, str]:
    """All that is in a folder, tables unpacked, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                found[f"{path.relative_to(folder)} rows"] = f"{table.schema.metadata}{table.to_pylist()}"
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_secret_is_kept_or_shown(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A build on a Prefect server in which every kind of failure quotes the secrets; then status. The server's database
    is read too."""
    prompts = ["a house", "bad low_res", "RuntimeError", "ShardError", "a tree", "a boat"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    config = {
        "name": "demo",
        "prompts": "prompts.txt",
        "samples_per_shard": 1,
        "low_res": {"height": 16, "width": 16},
        "dispatch": {"where": "here"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out, prefect = tmp_path / "out", tmp_path / "prefect"
    prefect.mkdir()
    stack = Stack(prefect)
    environment = {
        **os.environ,
        **SECRETS,
        "PREFECT_HOME": str(prefect),
        "PREFECT_API_URL": stack.api,
        "HOME": str(tmp_path),
        "PYTHONPATH": PYTHONPATH,
    }
    stack.environment["PREFECT_SERVER_API_AUTH_STRING"] = SECRETS["PREFECT_API_AUTH_STRING"]
    stack.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(stack.port), "--no-ui")
    request.addfinalizer(lambda: stack.kill("server"))
    wait(stack.healthy, seconds=300)
    said = ""
    for words, status in (
        (["run", "config.yaml", "--root", str(out)], 1),
        (["status", str(out)], 0),
        (["run", "config.yaml", "--root", f"s3://AKIA{CANARY}:{CANARY}/x@bucket/out"], 2),
        (["status", f"https://me:{CANARY}@host/x"], 2),
    ):
        done = subprocess.run(
            [sys.executable, "-c", BUILD, *words, ",".join(name for name in SECRETS if name in environment)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == status, done.stdout + done.stderr
        said += done.stdout + done.stderr
    assert "refused: [hidden]" in said
    kept = {name: text for folder in (out, prefect) for name, text in texts(folder).items()}
    assert any("refused: [hidden]" in text for name, text in kept.items() if name.endswith(".parquet rows"))
    assert any("refused: [hidden]" in text for name, text in kept.items() if name.startswith("prefect.db"))
    assert CANARY not in said
    assert [name for name, text in kept.items() if CANARY in text] == []


def test_an_unreachable_store_is_named_without_the_secrets_of_its_address() -> None:
    with pytest.raises(ConnectionError, match="cannot be reached") as caught, explained("s3://bucket"):
        raise EndpointConnectionError(endpoint_url=f"{SECRETS['AWS_ENDPOINT_URL']}/bucket")
    assert CANARY not in str(caught.value)


def test_a_configuration_with_a_secret_is_refused_without_telling_it() -> None:
    for values in (
        {"root": f"s3://key:{CANARY}@bucket/x"},
        {"prompts": f"https://me:{CANARY}@host/prompts.txt"},
        {"images": f"https://host/x.tar?X-Amz-Signature={CANARY}"},
        {"captions": {"base_url": f"https://{CANARY}@host/v1"}},
        {"captions": {"api_key": CANARY}},
        {"model": {"token": CANARY}},
        {"seed": CANARY},
    ):
        with pytest.raises(ConfigError) as refused:
            parse_config({"name": "demo", **values})
        assert CANARY not in str(refused.value)


# ----------------------------------------------------------------------------------------------------------------------
# pages

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style></script></title></textarea><iframe src=javascript:alert(1)>",
    "<!--><img src=http://evil.example/a.png>-->",
    "<a href=javascript:alert(1)>x</a>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "</p><base href=http://evil.example/><meta http-equiv=refresh content=0;url=http://evil.example>",
    "\x00<\x00script>alert(1)</script>\ud800\u2028<img\x0bsrc=x\x0conerror=alert(1)>",
    "data:text/html,<script>alert(1)</script>",
    "]]><![CDATA[<script>alert(1)</script>",
    "{{ script }}{% include 'page.js' %}{# <img src=x onerror=alert(1)> #}",
)


def sample(text: str) -> ReportSample:
    row = {"row": text, "col": text, "y0": 0, "x0": 0, "y1": 64, "x1": 64, "caption": text, "status": text}
    quality = {"agreement_psnr": 30.0, "seam": 1.0, "clipped": 0.0, "flags": [text]}
    image = png((1, 2, 3), (64, 64))
    return ReportSample(text, text, image, image, [row], quality, {text: text}, text)


def elements(html: str) -> list[tuple[str, dict[str, str]]]:
    """What a browser makes of a page, by the HTML standard's own algorithm: every element with its attributes."""
    tree = html5lib.parse(html, treebuilder="etree", namespaceHTMLElements=False)
    return [(str(element.tag), dict(element.attrib)) for element in tree.iter()]


def shape(html: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(sorted(attributes))) for tag, attributes in elements(html)]


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_hostile_text_adds_no_element_and_no_attribute_to_the_report(attack: str) -> None:
    failure = {"key": attack, "stage": attack, "error_class": attack, "message": attack, "command": attack}

    def page(text: str) -> str:
        row: dict[str, Any] = dict.fromkeys(failure, text)
        return render_report(text, {text: text}, [sample(text)], [row])

    hostile, harmless = page(attack), page("text")
    assert shape(hostile) == shape(harmless)
    for _, attributes in elements(hostile):
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action", "formaction", "data", "srcset", "style"):
                assert value.startswith("data:image/") or value == "data:," or name == "style"
                assert "evil" not in value


def test_images_with_scripts_in_them_are_not_embedded() -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    html = render_report("t", {}, [ReportSample("k", "p", svg, svg)])
    assert "not a readable image" in html
    assert base64_of(svg) not in html
    assert "alert(1)" not in html


def base64_of(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()[:40]


def test_the_dataset_card_holds_no_text_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmaster_stages.models.identity.weights_of", lambda config: Weights(config.model.id))
    prompts = [attack for attack in ATTACKS if attack.isprintable()]
    dataset = planned(tmp_path / "out", prompts, tmp_path, samples_per_shard=20)
    for stage in dataset.hashes:
        run_stage(dataset, stage, 0, process=FAKES[stage])
    assert write_manifest(dataset).samples == len(prompts) > 8
    card = dataset.folder.read("README.md").decode()
    assert not any(attack in card for attack in ATTACKS)
    assert json.dumps(yaml.safe_load(card.split("---\n")[1]))
