"""Ctrl-C and SIGTERM: the command ends within seconds, keeps what is done, leaves no litter. Real signals, real
processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from PIL import Image

from resmaster_flows.cli.main import VERBS, main
from resmaster_stages.storage.scratch import PREFIX
from tests.checkout import ROOT
from tests.durability.test_recovery import write_config
from tests.fake_stages import config_at

SLOW = """
import sys, time
from resmaster_flows.cli.main import main
from tests.fake_stages import FAKES
from tests.standin_cli import install


def slow(stage):
    def process(config, samples):
        for sample in samples:
            time.sleep(0.3 if sample.prompt != "quick" else 0)
            yield from FAKES[stage](config, [sample])
    return process


install({stage: slow(stage) for stage in FAKES})
sys.exit(main())
"""
BESIDE = """
import sys, time
from importlib import import_module
from pathlib import Path
from resmaster_flows.cli.main import main
from resmaster_stages.dataset.sample import Output
from tests.fake_stages import FAKES, files_of
from tests.standin_cli import install

begun = Path(sys.argv.pop(1))


def low_res(config, samples):
    for sample in samples:
        if sample.prompt == "second":
            begun.touch()
            time.sleep(600)
        yield Output(sample.key, finish=lambda sample=sample: finish(sample))


def finish(sample):
    while not begun.exists():
        time.sleep(0.01)
    time.sleep(1)  # the signal comes in the middle of this
    return files_of(sample, 16)


install({**FAKES, "low_res": low_res})
sys.exit(main())
"""
STUBBORN = """
import sys, time
from resmaster_flows.cli import stop
stop.GRACE_SECONDS = float(sys.argv[1])
with stop.stoppable("stopped"):
    ready = False
    while True:
        try:
            if not ready:
                ready = True
                print("ready", flush=True)
            time.sleep(60)
        except (KeyboardInterrupt, stop.Terminated):
            print("unwinding", flush=True)
"""


def start(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A command in a session of its own, with scratch folders in `folder`."""
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what a shell starts in the background, tests included, ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(scratch: Path) -> list[str]:
    """Running processes that were started with scratch folders in `scratch` (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={scratch}\0".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("stop", "to_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)],
    ids=["ctrl-c", "sigterm"],
)  # fmt: skip
def test_a_stopped_run_keeps_what_is_done_and_leaves_no_litter(
    stop: signal.Signals, to_group: bool, status: int, tmp_path: Path
) -> None:
    """As a terminal does it (the whole group) and as a supervisor does it (the one process)."""
    root, scratch = tmp_path / "out", tmp_path / "scratch"
    (tmp_path / "prompts.txt").write_text("\n".join(["quick", *(f"prompt {n}" for n in range(100))]))
    config = config_at("out", prompts=str(tmp_path / "prompts.txt"), samples_per_shard=200, spill_seconds=0)
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    process = start(["-c", SLOW, "run", str(tmp_path / "slow.yaml"), "--root", str(root)], scratch)
    wait_for(lambda: len(list(root.glob("demo/cache/*/*.sample"))) >= 3, process)
    assert list(scratch.iterdir())
    (os.killpg if to_group else os.kill)(process.pid, stop)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "interrupted; what is done is kept" in error
    assert "Traceback" not in out + error
    assert len(list(root.glob("demo/cache/*/*.sample"))) >= 3
    assert list(root.glob("demo/cache/*/at.json")) == [], "nobody is blamed"
    assert [path for path in root.rglob("*") if path.name.endswith(".tmp")] == []
    assert list(scratch.iterdir()) == []
    if sys.platform == "linux":
        for _ in range(500):
            if not processes_of(scratch):
                break
            time.sleep(0.02)
        assert processes_of(scratch) == [], "no process is left behind"


@pytest.mark.timeout(300)
def test_a_stopped_run_finishes_what_is_computed(tmp_path: Path) -> None:
    """SIGTERM while the second sample is computed and the first one is encoded."""
    root, scratch, begun = tmp_path / "out", tmp_path / "scratch", tmp_path / "begun"
    (tmp_path / "prompts.txt").write_text("first\nsecond")
    alone = {"height": 16, "width": 16, "batch_size": 1}
    config = config_at("out", prompts=str(tmp_path / "prompts.txt"), spill_seconds=0, low_res=alone)
    (tmp_path / "beside.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    process = start(["-c", BESIDE, str(begun), "run", str(tmp_path / "beside.yaml"), "--root", str(root)], scratch)
    wait_for(begun.exists, process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "Traceback" not in out + error
    assert len(list(root.glob("demo/cache/*/*.sample"))) == 1
    assert list(root.glob("demo/cache/*/at.json")) == [], "nobody is blamed"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("first", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_what_does_not_end(first: signal.Signals, status: int, tmp_path: Path) -> None:
    process = start(["-c", STUBBORN, "600"], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "unwinding\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert error == "stopped\n"


def test_what_does_not_unwind_is_ended_after_the_grace(tmp_path: Path) -> None:
    process = start(["-c", STUBBORN, "0.2"], tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@pytest.mark.parametrize("name", [verb.name for verb in VERBS])
def test_an_interrupted_verb_says_what_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What builds, repairs, publishes, exports, compares, deletes or takes choices goes on; others begin anew."""

    def interrupted(args: object, console: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(f"resmaster_flows.cli.{name}"), "run", interrupted)
    words = {"explain": ["root", "key"], "compare": ["c.yaml", "--methods", "direct"], "upscale": ["a.png", "b.png"]}
    words |= {"export": ["root", "folder", "--as", "folder"], "schema": [], "completion": ["bash"]}
    assert main([name, *words.get(name, ["root"])]) == 130
    said = {
        True: "interrupted; what is done is kept: run the same command again to go on\n",
        False: "interrupted; nothing was written\n",
    }
    assert capsys.readouterr().err == said[name in ("run", "view", "repair", "publish", "export", "gc", "compare")]


def test_an_interrupted_upscale_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the model works, and while the image is encoded."""
    from resmaster_flows.cli import upscale

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    words = ["upscale", str(tmp_path / "photo.png"), str(tmp_path / "out.png"), "--method", "lanczos"]
    for module, name in ((upscale, "upscale_as_configured"), (Image.Image, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            assert main(words) == 130
        assert "interrupted; nothing was written" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_handlers_are_put_back() -> None:
    from resmaster_flows.cli.stop import Terminated, stoppable

    before = signal.getsignal(signal.SIGTERM)

    def stopped() -> None:
        with stoppable("stopped"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(Terminated):
        stopped()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_real_model_is_stopped_in_the_middle_of_a_image(tmp_path: Path) -> None:
    """SIGTERM while the UNet works on the second high-res image: the first one is kept."""
    upscale = {"scale": 1.5, "steps": 30, "micro_conditioning": "native", "negative_prompt": ""}
    config = write_config(tmp_path, spill_seconds=0, upscale=upscale)
    root, scratch = tmp_path / "out", tmp_path / "scratch"
    process = start(["-m", "resmaster_flows.cli.main", "run", str(config), "--root", str(root)], scratch)
    wait_for(lambda: list(root.glob("tiny/cache/high_res-*/*.sample")), process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert list(root.glob("tiny/cache/high_res-*/*.sample"))
    assert list(root.glob("tiny/cache/*/at.json")) == []
    assert list(scratch.glob(f"{PREFIX}*")) == []
