"""The commands of docs/storage.md run: those on a dataset on a small one, those about a bucket on a real S3 server."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from resmaster_flows.cli.main import main
from tests.checkout import ROOT
from tests.durability.injection import PROMPTS, build
from tests.s3_server import SCRIPT, free_ports, weed
from tests.test_readme import reader_environment, workplace

PAGE = (ROOT / "docs" / "storage.md").read_text()
BUCKET, *OTHERS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_its_commands_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    build(str(tmp_path / "out"), str(tmp_path / "prompts.txt"))
    places = {"s3://bucket/prefix": str(tmp_path / "new"), "out/picturebook": str(tmp_path / "out" / "demo")}
    commands = [line for block in OTHERS for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["publish", "doctor", "verify", "repair", "gc"]
    for command in commands:
        words = [places.get(word, word) for word in shlex.split(command)]
        assert main(words[1:]) == 0, command


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_lines_about_a_bucket_run(tmp_path: Path) -> None:
    """As they stand, except for the port and the server's end: other programs may use the port of the page."""
    workplace(tmp_path, limit=2)
    port = free_ports(5)
    script = BUCKET.replace("seaweedfs.sh start", f"seaweedfs.sh start --port {port}").replace(":8333", f":{port}")
    assert script.count(str(port)) == 2
    server = [str(SCRIPT), "stop", "--dir", str(tmp_path / "out" / "seaweedfs")]
    environment = {**reader_environment(), "WEED": str(weed())}
    try:
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        assert "report: s3://datasets/picturebook/report/index.html" in done.stdout
        again = subprocess.run(
            ["bash", "-euc", script.splitlines()[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (again.returncode, again.stdout.startswith("runs already")) == (0, True)
    finally:
        stopped = subprocess.run(server, capture_output=True, text=True)
    assert stopped.stdout == "stopped\n"
    assert subprocess.run(server, capture_output=True, text=True).stdout == "does not run\n"
