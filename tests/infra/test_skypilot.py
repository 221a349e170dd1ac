"""The tasks for SkyPilot: what they name is there, their scripts do what they say, and SkyPilot takes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from resmaster_flows.cli.execute import LIMITED
from tests.checkout import ROOT

TASKS = sorted((ROOT / "infra/skypilot").glob("*.yaml"))
SKY = os.environ.get("RESMASTER_TEST_SKY")

TAKE = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps([[each.use_spot, (each.job_recovery or {}).get("strategy")] for each in task.resources]))
"""
CASES = [(path, yaml.safe_load(path.read_text())) for path in TASKS]
each_task = pytest.mark.parametrize(("path", "task"), CASES, ids=[path.stem for path in TASKS])


def test_there_is_a_task_for_workers_and_one_for_a_build() -> None:
    assert [path.name for path in TASKS] == ["run.yaml", "shards.yaml"]


@each_task
def test_what_a_task_names_is_there(path: Path, task: dict[str, Any]) -> None:
    text = path.read_text()
    for name in re.findall(r"(?:infra|deployments)/[\w./-]+", text):
        assert (ROOT / name).exists(), name
    used = set(re.findall(r"\$(\w{2,})", task["run"]))
    assert used <= task["envs"].keys(), "what the script reads can be given"
    assert used | {"PREFECT_API_URL", "AWS_ENDPOINT_URL"} >= task["envs"].keys()
    assert not any({**task["envs"], **task["secrets"]}.values()), "no value is kept here"
    assert set(re.findall(r"--secret (\w+)", text)) == task["secrets"].keys()
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)


def run(task: dict[str, Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The task's script, in a folder with programs that only print their words and end as ENDS says."""
    for name in (".venv/bin/resmaster", "infra/workers.sh"):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/bin/sh\necho "$(basename "$0") $@ at ${AWS_ENDPOINT_URL-AWS}"\nexit ${ENDS:-0}\n')
        program.chmod(0o755)
    values = {"PATH": os.environ["PATH"], **task["envs"], **environment}
    words = ["bash", "-c", task["run"]]
    return subprocess.run(words, cwd=folder, env=values, capture_output=True, text=True, check=False)


def test_the_scripts_ask_for_what_they_need(tmp_path: Path) -> None:
    tasks = {path.stem: task for path, task in CASES}
    assert "give --env PREFECT_API_URL" in run(tasks["shards"], tmp_path).stderr
    found = run(tasks["shards"], tmp_path, PREFECT_API_URL="http://server/api")
    assert (found.returncode, found.stdout) == (0, "workers.sh shards at AWS\n")
    assert "give --env CONFIG=" in run(tasks["run"], tmp_path, CONFIG="a.yaml").stderr
    given = {"CONFIG": "a.yaml", "ROOT": "s3://b", "OPTIONS": "--limit 3", "AWS_ENDPOINT_URL": "http://store"}
    assert run(tasks["run"], tmp_path, **given).stdout == (
        "resmaster run a.yaml --root s3://b --limit 3 at http://store\n"
    )
    ends = {status: run(tasks["run"], tmp_path, **given, ENDS=str(status)).returncode for status in (0, 1, LIMITED)}
    assert (ends[0], ends[LIMITED]) == (0, 0), "a build that a limit ended needs no further try"
    assert ends[1] != 0


@pytest.mark.slow
@each_task
def test_skypilot_takes_the_task(path: Path, task: dict[str, Any], tmp_path: Path) -> None:
    if SKY is None:
        pytest.skip("skypilot needs an environment of its own: RESMASTER_TEST_SKY=/that/venv/bin/python")
    own = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    own.pop("PYTHONPATH", None)
    done = subprocess.run([SKY, "-c", TAKE, str(path)], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[True, "EAGER_NEXT_REGION"]] * len(task["resources"]["accelerators"])
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**task, "num_node": 2}))
    words = [SKY, "-c", TAKE, str(tmp_path / "wrong.yaml")]
    assert subprocess.run(words, env=own, capture_output=True, check=False).returncode != 0
