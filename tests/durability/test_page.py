"""The commands of docs/storage.md run, on a small dataset."""

import re
import shlex
from pathlib import Path

from resmaster_flows.cli.main import main
from tests.checkout import ROOT
from tests.durability.injection import PROMPTS, build

PAGE = (ROOT / "docs" / "storage.md").read_text()


def test_its_commands_run(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    build(str(tmp_path / "out"), str(tmp_path / "prompts.txt"))
    places = {"s3://bucket/prefix": str(tmp_path / "new"), "out/picturebook": str(tmp_path / "out" / "demo")}
    commands = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert [command.split()[1] for command in commands] == ["doctor", "verify", "repair", "gc"]
    for command in commands:
        words = [places.get(word, word) for word in shlex.split(command)]
        assert main(words[1:]) == 0, command
