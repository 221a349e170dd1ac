"""The batch scripts for Slurm, submitted to a real Slurm of one node that runs in this test."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.checkout import PYTHONPATH, ROOT
from tests.fake_stages import config_at
from tests.server.conftest import wait

SCRIPTS = sorted((ROOT / "infra/slurm").glob("*.sbatch"))
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

CONFIG = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=100000 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
"""A node that claims to have two GPUs. Its memory is not counted."""


def test_scripts_are_told_apart_and_pass_the_shell() -> None:
    assert [path.name for path in SCRIPTS] == ["builds.sbatch", "run.sbatch", "shards.sbatch"]
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", str(path)], check=True)
        text = path.read_text()
        assert os.access(path, os.X_OK)
        for name in re.findall(r"(?:infra|deployments)/[\w./-]+", text):
            assert (ROOT / name).exists(), name
        assert {"--requeue", "--open-mode=append"} <= set(re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE))


class Cluster:
    """A Slurm of one node. Its user is the one of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        ports = [_free_port() for _ in range(2)]
        text = CONFIG.format(host=host, folder=folder, port=ports[0], node_port=ports[1])
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        for name in ("state", "spool"):
            (folder / name).mkdir()
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "SLURM"))}
        self.environment = {**own, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def ask(self, *words: str, **environment: str) -> str:
        done = subprocess.run(
            words, env={**self.environment, **environment}, capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def idle(self) -> bool:
        done = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() in ("idle", "mixed")

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job))
        assert found
        return found[1]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)}: Debian's packages slurmctld, slurmd and slurm-client")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    daemons = []
    try:
        for name in ("slurmctld", "slurmd"):
            log = (found.folder / f"{name}.log").open("w")
            words = [name, "-D", "-f", found.environment["SLURM_CONF"]]
            daemons.append(subprocess.Popen(words, env=found.environment, stdout=log, stderr=log))
        wait(found.idle, seconds=60)
        yield found
        subprocess.run(["scancel", "--state", "RUNNING"], env=found.environment, check=False)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_the_script(cluster: Cluster, path: Path) -> None:
    array = ["--array=1-4"] if path.name == "shards.sbatch" else []
    assert "to start at" in cluster.ask("sbatch", "--test-only", *array, str(path))


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_where_it_was(cluster: Cluster, tmp_path: Path) -> None:
    """A real job: killed and queued again in the middle of its first shard, it does the rest."""
    (tmp_path / "prompts.txt").write_text("\n".join("abcdef"))
    config = config_at(tmp_path / "out", prompts=str(tmp_path / "prompts.txt"), samples_per_shard=2)
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    program = tmp_path / "resmaster"
    program.write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{PYTHONPATH}"\necho begun >> "{tmp_path}/begun"\n'
        f'[ "$(wc -l < "{tmp_path}/begun")" -gt 1 ] || exec sleep 600\n'  # the first time, it is at work for long
        f'exec "{sys.executable}" -m tests.standin_cli "$@"\n'
    )
    program.chmod(0o755)
    answer = cluster.ask(
        "sbatch", f"--output={tmp_path}/log", str(ROOT / "infra/slurm/run.sbatch"), str(tmp_path / "demo.yaml"),
        RESMASTER=str(program), PREFECT_API_URL="http://127.0.0.1:1/api",
    )  # fmt: skip
    job = answer.split()[-1]
    wait((tmp_path / "begun").exists, seconds=120)
    cluster.ask("scontrol", "requeue", job)
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), seconds=300)
    log = (tmp_path / "log").read_text()
    assert cluster.state(job) == "COMPLETED", log
    assert "6 samples in" in log
    assert len(list((tmp_path / "out/demo/commits").glob("*/*.json"))) == 4 * 3, "four stages of three shards"
    assert len((tmp_path / "begun").read_text().split()) == 2
