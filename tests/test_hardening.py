"""What production set-ups promise: pods of the profile `restricted`, services without rights, private files, pinned
packages and images.

No cluster is asked here. The rules of Kubernetes' Pod Security Standards are stated one by one, and each is tested by a
pod that breaks it. Network policies are evaluated as Kubernetes does.
"""

from __future__ import annotations

import copy
import hashlib
import http.server
import importlib.util
import ipaddress
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from docker.models.containers import _create_container_args
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from resmaster_stages.storage.scratch import PREFIX, YOUNG_SECONDS, reclaim, scratch_folder
from tests.checkout import ROOT
from tests.test_infra import filled, template

INFRA = ROOT / "infra"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes/worker.yaml").read_text()))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in documents() if each["kind"] == kind}


def job_pod() -> dict[str, Any]:
    """The pod of a run, from the job template with its defaults."""
    found = template("kubernetes")
    values = {name: field.get("default") for name, field in found["variables"]["properties"].items()}
    return filled(found["job_configuration"]["job_manifest"], values)["spec"]["template"]  # type: ignore[no-any-return]


def pods() -> dict[str, dict[str, Any]]:
    return {"worker": of_kind("Deployment")["resmaster-worker"]["spec"]["template"], "run": job_pod()}


# ------------------------------------------------------------------------------------------------------- pod security

Pod = dict[str, Any]
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def containers(pod: Pod) -> list[dict[str, Any]]:
    spec = pod["spec"]
    return [*spec["containers"], *spec.get("initContainers", []), *spec.get("ephemeralContainers", [])]


def security(pod: Pod) -> list[dict[str, Any]]:
    """The security context of each container, with what the pod says where the container says nothing."""
    shared = pod["spec"].get("securityContext", {})
    inherited = {key: shared[key] for key in ("runAsNonRoot", "runAsUser", "seccompProfile") if key in shared}
    return [{**inherited, **each.get("securityContext", {})} for each in containers(pod)]


def capabilities(pod: Pod, what: str) -> list[set[str]]:
    return [set(each.get("capabilities", {}).get(what, [])) for each in security(pod)]


def everywhere(pod: Pod) -> list[dict[str, Any]]:
    return [pod["spec"].get("securityContext", {}), *security(pod)]


RESTRICTED: dict[str, Callable[[Pod], bool]] = {
    "no host namespaces": lambda pod: not any(pod["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC")),
    "no host process": lambda pod: not any(s.get("windowsOptions", {}).get("hostProcess") for s in everywhere(pod)),
    "not privileged": lambda pod: not any(s.get("privileged") for s in security(pod)),
    "no host ports": lambda pod: not any(port.get("hostPort") for c in containers(pod) for port in c.get("ports", [])),
    "no sysctls": lambda pod: not pod["spec"].get("securityContext", {}).get("sysctls"),
    "proc is masked": lambda pod: all(s.get("procMount", "Default") == "Default" for s in security(pod)),
    "AppArmor stays": lambda pod: all(
        s.get("appArmorProfile", {}).get("type", "RuntimeDefault") != "Unconfined" for s in everywhere(pod)
    ),
    "SELinux stays": lambda pod: all(
        o.get("type", "") in SELINUX and not o.get("user") and not o.get("role")
        for o in (s.get("seLinuxOptions", {}) for s in everywhere(pod))
    ),
    "volumes": lambda pod: all(set(volume) - {"name"} <= VOLUMES for volume in pod["spec"].get("volumes", [])),
    "no escalation": lambda pod: all(s.get("allowPrivilegeEscalation") is False for s in security(pod)),
    "not root": lambda pod: all(s.get("runAsNonRoot") is True for s in security(pod)),
    "no user 0": lambda pod: all(s.get("runAsUser") != 0 for s in everywhere(pod)),
    "seccomp": lambda pod: all(
        s.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost") for s in security(pod)
    ),
    "capabilities dropped": lambda pod: all("ALL" in dropped for dropped in capabilities(pod, "drop")),
    "capabilities added": lambda pod: all(added <= {"NET_BIND_SERVICE"} for added in capabilities(pod, "add")),
}
"""The profile `restricted` of the Pod Security Standards, which holds the rules of `baseline` too."""

OWN: dict[str, Callable[[Pod], bool]] = {
    "the root file system is read only": lambda pod: all(
        s.get("readOnlyRootFilesystem") is True for s in security(pod)
    ),
    "/tmp can be written": lambda pod: all(
        "/tmp" in {m["mountPath"] for m in c["volumeMounts"]} for c in containers(pod)
    ),
    "memory and disk are limited": lambda pod: all(
        {"memory", "ephemeral-storage"} <= c["resources"]["limits"].keys() & c["resources"]["requests"].keys()
        for c in containers(pod)
    ),
    "the image has a version": lambda pod: all(
        re.search(r":(?!latest)[\w.-]+(@sha256:[0-9a-f]{64})?$", c["image"]) for c in containers(pod)
    ),
    "it says whether it has a token": lambda pod: "automountServiceAccountToken" in pod["spec"],
}

BREAKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "no host namespaces": lambda spec, container: spec.update(hostPID=True),
    "no host process": lambda spec, c: c["securityContext"].update(windowsOptions={"hostProcess": True}),
    "not privileged": lambda spec, container: container["securityContext"].update(privileged=True),
    "no host ports": lambda spec, container: container.update(ports=[{"containerPort": 1, "hostPort": 1}]),
    "no sysctls": lambda spec, container: spec["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
    "proc is masked": lambda spec, container: container["securityContext"].update(procMount="Unmasked"),
    "AppArmor stays": lambda spec, c: c["securityContext"].update(appArmorProfile={"type": "Unconfined"}),
    "SELinux stays": lambda spec, container: spec["securityContext"].update(seLinuxOptions={"type": "spc_t"}),
    "volumes": lambda spec, container: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "no escalation": lambda spec, container: container["securityContext"].pop("allowPrivilegeEscalation"),
    "not root": lambda spec, container: spec["securityContext"].pop("runAsNonRoot"),
    "no user 0": lambda spec, container: container["securityContext"].update(runAsUser=0),
    "seccomp": lambda spec, container: spec["securityContext"].pop("seccompProfile"),
    "capabilities dropped": lambda spec, container: container["securityContext"]["capabilities"].pop("drop"),
    "capabilities added": lambda spec, c: c["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    "the root file system is read only": lambda spec, c: c["securityContext"].pop("readOnlyRootFilesystem"),
    "/tmp can be written": lambda spec, container: container.update(volumeMounts=container["volumeMounts"][1:]),
    "memory and disk are limited": lambda spec, container: container["resources"]["limits"].pop("memory"),
    "the image has a version": lambda spec, container: container.update(image="resmaster-pipeline:latest"),
    "it says whether it has a token": lambda spec, container: spec.pop("automountServiceAccountToken"),
}


def broken(pod: Pod) -> set[str]:
    """The rules that a pod breaks."""
    return {name for name, holds in {**RESTRICTED, **OWN}.items() if not holds(pod)}


@pytest.mark.parametrize("name", ["worker", "run"])
def test_a_pod_is_of_the_profile_restricted(name: str) -> None:
    assert broken(pods()[name]) == set()


@pytest.mark.parametrize("rule", [*RESTRICTED, *OWN])
def test_each_rule_finds_the_pod_that_breaks_it(rule: str) -> None:
    for pod in pods().values():
        changed = copy.deepcopy(pod)
        BREAKS[rule](changed["spec"], changed["spec"]["containers"][0])
        assert broken(changed) == {rule}


def test_the_namespace_takes_no_other_pods() -> None:
    (namespace,) = of_kind("Namespace").values()
    labels = namespace["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
    others = {each["metadata"]["namespace"] for each in documents() if each["kind"] != "Namespace"}
    assert (
        others
        == {namespace["metadata"]["name"]}
        == {template("kubernetes")["variables"]["properties"]["namespace"]["default"]}
    )


def test_rights_are_those_that_the_worker_uses() -> None:
    """prefect-kubernetes makes, watches and deletes jobs, and reads their pods and logs. Runs ask nothing."""
    (role,) = of_kind("Role").values()
    rights = {
        (group, kind): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for kind in rule["resources"]
    }
    assert rights == {
        ("batch", "jobs"): {"get", "list", "watch", "create", "delete"},
        ("", "pods"): {"get", "list", "watch"},
        ("", "pods/log"): {"get"},
    }
    assert not {"ClusterRole", "ClusterRoleBinding"} & {each["kind"] for each in documents()}
    tokens = {name: pod["spec"]["automountServiceAccountToken"] for name, pod in pods().items()}
    assert tokens == {"worker": True, "run": False}
    assert not any(account["automountServiceAccountToken"] for account in of_kind("ServiceAccount").values())


def test_the_password_of_the_server_is_in_no_manifest_of_a_job() -> None:
    (container,) = pods()["worker"]["spec"]["containers"]
    values = {each["name"]: each["value"] for each in container["env"]}
    setting = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert {"secretRef": {"name": values[f"{setting}_NAME"]}} in container["envFrom"]
    assert f"--from-literal={values[f'{setting}_KEY']}=" in (INFRA / "kubernetes/worker.yaml").read_text()
    assert values["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] == "resmaster", "it has rights in no other"


# ------------------------------------------------------------------------------------------------------------ networks


def reaches(labels: dict[str, str], address: str, port: int, protocol: str = "TCP", namespace: str = "") -> bool:
    """Whether a pod may call (address, port), as Kubernetes reads the policies: a pod that a policy selects may do
    nothing but what a policy allows."""
    policies = [p["spec"] for p in of_kind("NetworkPolicy").values() if selected(p["spec"]["podSelector"], labels)]
    policies = [spec for spec in policies if "Egress" in spec["policyTypes"]]
    rules = [rule for spec in policies for rule in spec.get("egress", [])]
    return not policies or any(
        allows(rule, address, namespace) and {"protocol": protocol, "port": port} in rule["ports"] for rule in rules
    )


def selected(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def allows(rule: dict[str, Any], address: str, namespace: str) -> bool:
    for peer in rule["to"]:
        if "ipBlock" in peer:
            block, place = peer["ipBlock"], ipaddress.ip_address(address)
            if place in ipaddress.ip_network(block["cidr"]) and not any(
                place in ipaddress.ip_network(e) for e in block["except"]
            ):
                return True
        elif selected(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return True
    return False


@pytest.mark.parametrize(
    ("pod", "address", "port", "may"),
    [
        ("run", "52.216.1.1", 443, True),
        ("run", "10.0.0.7", 4200, True),
        ("run", "10.0.0.8", 8333, True),
        ("run", "2600:1f14::1", 443, True),
        ("run", "10.0.0.9", 5432, False),
        ("run", "10.0.0.9", 22, False),
        ("run", "10.0.0.1", 6443, False),
        ("run", "169.254.169.254", 80, False),
        ("run", "169.254.169.254", 443, False),
        ("run", "fd00:ec2::254", 443, False),
        ("worker", "10.0.0.1", 443, True),
        ("worker", "10.0.0.1", 6443, True),
        ("worker", "10.0.0.7", 4200, True),
        ("worker", "10.0.0.8", 8333, False),
        ("worker", "169.254.169.254", 443, False),
        ("another", "52.216.1.1", 443, False),
    ],
)
def test_what_a_pod_may_call(pod: str, address: str, port: int, may: bool) -> None:
    labels = pods()[pod]["metadata"]["labels"] if pod in pods() else {"app": pod}
    assert reaches(labels, address, port) is may


def test_every_pod_asks_for_names_and_none_is_called() -> None:
    for labels in ({"app": "resmaster-run"}, {"app": "resmaster-worker"}, {}):
        for protocol in ("UDP", "TCP"):
            assert reaches(labels, "10.96.0.10", 53, protocol, "kube-system")
        assert not reaches(labels, "8.8.8.8", 53, "UDP")
    policies = [policy["spec"] for policy in of_kind("NetworkPolicy").values()]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    assert not any("ingress" in spec for spec in policies)


# ------------------------------------------------------------------------------------------------------------- compose


def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())  # type: ignore[no-any-return]


def faults(stack: dict[str, Any]) -> set[tuple[str, str]]:
    """(service, what is wrong with it) of a stack."""
    networks, found = stack["networks"], set()
    for name, service in stack["services"].items():
        wrong = {
            "capabilities": service.get("cap_drop") != ["ALL"],
            "added capabilities": service.get("cap_add", []) != (["CHOWN"] if name == "folders" else []),
            "privileges": service.get("security_opt") != ["no-new-privileges:true"] or service.get("privileged"),
            "root file system": service.get("read_only") is not True,
            "user": service.get("user", "0").split(":")[0] == "0" and name != "folders",
            "processes": not 0 < service.get("pids_limit", 0) <= 4096,
            "memory": "mem_limit" not in service,
            "image": not re.search(r":(?!latest)[\w.-]+(@sha256:\w{64})?\}?$", service["image"]),
            "ports": not all(port.startswith("127.0.0.1:") for port in service.get("ports", [])),
            "network": service.get("network_mode", "none") != "none"
            or not set(service.get("networks", [])) <= networks.keys(),
            "/tmp": name != "folders" and not any(re.search(r"(^|:)/tmp(:|$)", each) for each in places(service)),
            "a way out": bool(service.get("ports"))
            > any(not (networks[n] or {}).get("internal") for n in service.get("networks", [])),
        }
        found |= {(name, what) for what, is_wrong in wrong.items() if is_wrong}
    return found


def places(service: dict[str, Any]) -> list[str]:
    return [*service.get("tmpfs", []), *service.get("volumes", [])]


def test_a_service_of_the_stack_has_no_rights() -> None:
    assert faults(compose()) == set()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("capabilities", {"cap_drop": []}),
        ("added capabilities", {"cap_add": ["SYS_ADMIN"]}),
        ("privileges", {"privileged": True}),
        ("privileges", {"security_opt": ["seccomp:unconfined"]}),
        ("root file system", {"read_only": False}),
        ("user", {"user": "0:0"}),
        ("processes", {"pids_limit": -1}),
        ("image", {"image": "postgres:latest"}),
        ("image", {"image": "postgres"}),
        ("ports", {"ports": ["5432:5432"]}),
        ("network", {"network_mode": "host"}),
        ("/tmp", {"tmpfs": [], "volumes": []}),
    ],
)
def test_each_fault_of_a_service_is_found(what: str, change: dict[str, Any]) -> None:
    for name in ("database", "store", "server", "builds", "shards-gpu"):
        stack = compose()
        stack["services"][name].update(change)
        assert (name, what) in faults(stack)


def test_the_stack_publishes_two_ports_and_hides_its_database() -> None:
    services, networks = compose()["services"], compose()["networks"]
    assert {name for name, service in services.items() if service.get("ports")} == {"server", "store"}
    assert [name for name, network in networks.items() if not (network or {}).get("internal")] == ["outside"]
    assert {name for name, service in services.items() if "database" in service.get("networks", [])} == {
        "server",
        "database",
    }
    assert services["database"]["networks"] == ["database"]
    for name in ("database", "store", "server"):
        assert services[name]["healthcheck"]["test"]


def test_the_server_of_the_stack_demands_a_password_that_its_clients_have() -> None:
    text, services = (INFRA / "compose.yaml").read_text(), compose()["services"]
    name = "PREFECT_API_AUTH_STRING"
    assert services["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"] == f"${{{name}:?}}"
    for client in ("deploy", "builds", "shards-gpu", "shards-cpu"):
        assert services[client]["environment"][name].startswith(f"${{{name}:?set ")
    for variable in re.findall(r"\$\{(\w*AUTH\w*)(?!\w|:\?)", text):
        raise AssertionError(f"{variable} has a default")


def test_docker_takes_the_settings_of_a_run_which_have_no_rights() -> None:
    found = template("docker")
    values = {name: field.get("default") for name, field in found["variables"]["properties"].items()}
    job = filled(found["job_configuration"], {**values, "device_requests": None})
    settings = job["container_create_kwargs"]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert settings["user"] == "10001:10001"
    assert job["volumes"] == ["resmaster-scratch:/tmp", "resmaster-models:/models"], "all that a run writes to"
    made = _create_container_args({"image": job["image"], "version": "1.47", "volumes": job["volumes"], **settings})
    assert made["host_config"]["ReadonlyRootfs"] is True
    assert made["host_config"]["CapDrop"] == ["ALL"]
    assert made["host_config"]["SecurityOpt"] == ["no-new-privileges:true"]
    assert made["host_config"]["PidsLimit"] == 4096


def test_whatever_reads_models_can_keep_them() -> None:
    """Weights of a hub go to /models, which the image has on its root file system."""
    services = compose()["services"]
    for name in ("builds", "shards-gpu", "shards-cpu"):
        assert "models:/models" in services[name]["volumes"]
    (container,) = pods()["run"]["spec"]["containers"]
    assert "/models" in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_image_writes_to_tmp() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert re.search(r"HOME=/tmp .*?TMPDIR=/tmp ", text, re.DOTALL), (
        "a home that is there on a root file system read only"
    )


# ------------------------------------------------------------------------------------------------------ private files


def modes(folder: Path) -> dict[str, str]:
    """Name -> mode of what others may read or enter below a folder. Nothing counts in a folder they cannot enter."""
    found = {}
    for path in folder.iterdir():
        mode = stat.S_IMODE(path.lstat().st_mode)
        if mode & 0o077 and not path.is_symlink():
            found[path.name] = oct(mode)
            if path.is_dir():
                found |= {f"{path.name}/{name}": below for name, below in modes(path).items()}
    return found


def test_what_the_local_store_keeps_is_private(tmp_path: Path) -> None:
    program = tmp_path / "weed"
    program.write_text('#!/bin/bash\nfolder=${2#-dir=}\necho data >"$folder/data"\nmkdir "$folder/volume"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"umask 000; exec {INFRA}/seaweedfs.sh run --dir store/below"],
        cwd=tmp_path, env={**os.environ, "WEED": str(program)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store/below/data").read_text() == "data\n"
    assert modes(tmp_path) == {"weed": "0o755"}
    assert not modes(tmp_path / "store")


def test_scratch_is_private_whatever_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        with scratch_folder() as folder:
            (folder / "image.png").write_bytes(b"")
            assert not modes(tmp_path)
    finally:
        os.umask(before)


def test_what_others_put_where_scratch_is_made_is_left_alone(tmp_path: Path) -> None:
    """A folder for temporary files is shared by all users of a machine."""
    shared, mine = tmp_path / "tmp", tmp_path / "mine"
    for folder in (shared, mine):
        folder.mkdir()
    (mine / "notes.txt").write_text("mine")
    (shared / f"{PREFIX}link").symlink_to(mine)
    (shared / f"{PREFIX}file").write_text("no folder")
    (shared / f"{PREFIX}left").mkdir()
    old = time.time() - 10 * YOUNG_SECONDS
    for path in (mine, *shared.iterdir()):
        os.utime(path, (old, old), follow_symlinks=False)
    assert reclaim(str(shared)) == 1, "only the folder"
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]
    assert {path.name for path in shared.iterdir()} == {f"{PREFIX}link", f"{PREFIX}file"}


# --------------------------------------------------------------------------------------------------------- the packages

LOCKED = re.compile(r"^(?P<name>[a-z0-9][a-z0-9-]*)==(?P<version>[\w.]+) --hash=sha256:[0-9a-f]{64}$")


def locked() -> dict[str, str]:
    """Package -> version of the lock that the image installs."""
    lines = [line for line in (INFRA / "locks/cuda.lock").read_text().splitlines() if not line.startswith("#")]
    matches = [LOCKED.match(line) for line in lines]
    assert all(matches), "a line is a package with its version and one hash; a build with + is of another index"
    return {match["name"]: match["version"] for match in matches if match}


def test_the_lock_and_the_constraints_agree() -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])
    constraints = {canonicalize_name(name): version for name, version in constraints.items()}
    found = locked()
    assert list(found) == sorted(found)
    assert {name: version for name, version in found.items() if constraints.get(name, version) != version} == {}
    free = found.keys() - constraints.keys()
    assert {name for name in free if not name.startswith(("nvidia-", "cuda-"))} == {"triton", "setuptools"}, (
        "of PyTorch for CUDA"
    )


def test_the_lock_has_every_package_that_the_project_needs() -> None:
    """From pyproject.toml down through the requirements of what is installed here."""
    found, project = locked(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for name in ("pipeline", "s3") for line in project["optional-dependencies"][name]),
    ]
    todo, seen = [Requirement(line) for line in lines], set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(found[name]), requirement
        extras = {"", *requirement.extras}
        if (name, *sorted(extras)) in seen or name == "torch":  # the builds of PyTorch need different packages
            continue
        seen.add((name, *sorted(extras)))
        for line in distribution(name).requires or []:
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(below)
    assert len(seen) > 100


def test_the_image_installs_what_the_lock_names_and_nothing_else() -> None:
    text = (INFRA / "Dockerfile").read_text()
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert len(installs) == 2
    assert installs[0].startswith("--require-hashes ")
    assert {"--no-deps", "--no-index", "--no-build-isolation"} <= set(installs[1].split())
    assert "ARG LOCK=cuda\n" in text
    assert "infra/locks/$LOCK.lock" in installs[0]
    assert (INFRA / "locks/cuda.lock").is_file()
    assert "setuptools" in locked(), "what builds the project, without an index"


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    """A wheel with one module, as an index would have it."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(
            f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(
            f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return path


@contextmanager
def served(folder: Path, handler: type[http.server.BaseHTTPRequestHandler] | None = None) -> Iterator[str]:
    """A server on the loopback; without a handler, of the files in a folder."""
    wanted: Any = handler or partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), wanted) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


def index(folder: Path, *wheels: Path) -> None:
    """Write the pages of a package index."""
    for path in wheels:
        page = folder / "simple" / canonicalize_name(path.name.split("-")[0]) / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        digest = f"#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"
        with page.open("a") as file:
            file.write(f'<a href="/{path.name}{digest}">{path.name}</a>\n')


def lock(checkout: Path, address: str, *words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """infra/lock.sh in a checkout, with one package index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://{address}/simple",
        "PYTHON": python,
    }
    command = [str(checkout / "infra/lock.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small project that needs `first`, which needs `second`, and has the extras of the image."""
    folder = tmp_path / "checkout"
    (folder / "infra").mkdir(parents=True)
    shutil.copy(INFRA / "lock.sh", folder / "infra")
    extras = '[project.optional-dependencies]\npipeline = ["third"]\ns3 = ["fourth"]\n'
    (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\ndependencies = ["first_one>=1"]\n{extras}')
    (folder / "constraints.txt").write_text("second==2.0\n")
    return folder


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="locks are for the image's Python"
)
def test_a_lock_names_what_pip_then_takes_and_nothing_that_was_changed(tmp_path: Path, checkout: Path) -> None:
    first, second = wheel(tmp_path, "first_one", "1.0", ("second",)), wheel(tmp_path, "second", "2.0")
    third, fourth = (wheel(tmp_path, name, "1.0") for name in ("third", "fourth"))
    index(tmp_path, first, second, third, fourth, wheel(tmp_path, "second", "3.0"))  # constraints.txt does not name 3.0
    with served(tmp_path) as address:
        done = lock(checkout, address)
        assert (done.returncode, done.stdout) == (0, "written: infra/locks/cuda.lock (4 packages)\n"), done.stderr
        path = checkout / "infra/locks/cuda.lock"
        digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (first, fourth, second, third)]
        assert path.read_text().splitlines()[1:] == [
            f"first-one==1.0 --hash=sha256:{digests[0]}",
            f"fourth==1.0 --hash=sha256:{digests[1]}",
            f"second==2.0 --hash=sha256:{digests[2]}",
            f"third==1.0 --hash=sha256:{digests[3]}",
        ]

        def install() -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-cache-dir", "--require-hashes"]
            command += ["--index-url", f"http://{address}/simple", "--target", str(tmp_path / "into"), "-r", str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        assert install().returncode == 0
        assert (tmp_path / "into/second.py").exists()
        with zipfile.ZipFile(second, "a") as archive:
            archive.writestr("added.py", "")
        shutil.rmtree(tmp_path / "simple")
        index(tmp_path, first, second, third, fourth)  # the index itself tells the new hash
        done = install()
        assert done.returncode != 0
        assert "HASHES" in done.stderr


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux", reason="locks are for the image's Python"
)
def test_builds_of_another_index_go_to_a_lock_of_their_own(tmp_path: Path, checkout: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    rest = [wheel(tmp_path, name, "1.0") for name in ("third", "fourth")]
    index(tmp_path, wheel(tmp_path, "first_one", "1.0"), *rest)
    index(other, wheel(other, "first_one", "1.0+cpu"), *(wheel(other, name, "1.0") for name in ("third", "fourth")))
    with served(tmp_path) as address, served(other) as beside:
        done = lock(checkout, address, "cpu", f"http://{beside}/simple")
        assert done.returncode == 0, done.stderr
        assert "first-one==1.0+cpu --hash=" in (checkout / "infra/locks/cpu.lock").read_text()
        done = lock(checkout, beside)
        assert done.returncode != 0
        assert "first_one 1.0+cpu is no build of the package index" in done.stderr
        assert not (checkout / "infra/locks/cuda.lock").exists(), "a lock that holds nowhere else is not written"


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--all",), "unknown option"), (("A/b",), "small letters"), (("a", "b", "c"), "too many words")],
)
def test_a_mistake_with_the_lock_is_one_line(checkout: Path, words: tuple[str, ...], says: str) -> None:
    done = lock(checkout, "127.0.0.1:9", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("answer", "says"), [("Linux 3 12", "this is Linux 3 12"), ("Darwin 3 11", "this is Darwin")])
def test_a_lock_of_another_python_is_not_written(checkout: Path, answer: str, says: str) -> None:
    other = checkout / "python"
    other.write_text(f"#!/bin/sh\necho {answer}\n")
    other.chmod(0o755)
    done = lock(checkout, "127.0.0.1:9", python=str(other))
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / "infra/locks").exists()


# ----------------------------------------------------------------------------------------------------------- the images


def pin_images() -> Any:
    spec = importlib.util.spec_from_file_location("pin_images", INFRA / "pin_images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pin_images"] = module
    spec.loader.exec_module(module)
    return module


class Registry(http.server.BaseHTTPRequestHandler):
    """A registry as the distribution specification describes it: a challenge, a token, a manifest with its digest."""

    manifests: ClassVar = {
        ("team/tool", "1.2"): b'{"schemaVersion": 2, "manifests": []}',
        ("base", "3"): b'{"schemaVersion": 2}',
    }
    lie = False
    demanding = True
    """Whether it gives team/tool to those only who have a token."""
    elsewhere = ""
    """Where the manifests of team/tool are, if not here."""
    asked: ClassVar[list[str]]
    tokens: ClassVar[list[str]]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        type(self).tokens.append(self.headers.get("Authorization", ""))
        if self.path.startswith("/token?"):
            return self.answer(200, json.dumps({"token": f"for {self.path.partition('scope=')[2]}"}).encode())
        found = re.fullmatch(r"/v2/(.+)/manifests/([^/]+)", self.path)
        if found is None or (body := self.manifests.get((found[1], found[2]))) is None:
            return self.answer(404, b"{}")
        if found[1] == "team/tool" and self.elsewhere and self.headers.get("Authorization"):
            return self.answer(307, b"", {"Location": f"http://{self.elsewhere}{self.path}"})
        if found[1] == "team/tool" and self.demanding and not self.headers.get("Authorization"):
            realm = f'Bearer realm="http://{self.headers["Host"]}/token",service="registry",scope="repository:team/tool:pull"'
            return self.answer(401, b"{}", {"WWW-Authenticate": realm})
        assert "application/vnd.oci.image.index.v1+json" in self.headers["Accept"], "else one platform's manifest comes"
        digest = f"sha256:{hashlib.sha256(b'other' if self.lie else body).hexdigest()}"
        return self.answer(200, body, {"Docker-Content-Digest": digest})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def registry() -> Iterator[tuple[str, type[Registry]]]:
    handler = type("Fresh", (Registry,), {"asked": [], "tokens": []})
    with served(ROOT, handler) as address:
        yield address, handler


def files(folder: Path, address: str) -> dict[str, str]:
    """Files as in `infra/`, with images of a registry."""
    texts = {
        "Dockerfile": f"# syntax={address}/base:3\nFROM {address}/base:3 AS build\nFROM scratch AS a\nFROM build\n",
        "compose.yaml": f"a:\n  image: {address}/team/tool:1.2 # a comment\nb:\n  image: '{address}/base:3'\n"
        "c:\n  image: ${RESMASTER_IMAGE:-resmaster-pipeline:cuda}\n",
        "kubernetes/worker.yaml": f"        - name: worker\n          image: {address}/team/tool:1.2\n",
    }
    (folder / "kubernetes").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


def test_images_get_the_digests_of_their_registry(
    tmp_path: Path, registry: tuple[str, type[Registry]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, handler = registry
    program, before = pin_images(), files(tmp_path, address)
    assert program.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out.count("has no digest") == 5
    assert program.main([], tmp_path) == 0
    digests = {name: hashlib.sha256(body).hexdigest() for (name, _), body in handler.manifests.items()}
    for name, text in before.items():
        wanted = text.replace("base:3", f"base:3@sha256:{digests['base']}")
        wanted = wanted.replace("tool:1.2", f"tool:1.2@sha256:{digests['team/tool']}")
        assert (tmp_path / name).read_text() == wanted
    assert sum("/token?" in path for path in handler.asked) == 1
    assert program.main(["--check"], tmp_path) == 0
    handler.manifests = {**handler.manifests, ("base", "3"): b'{"schemaVersion": 2, "new": 1}'}
    assert program.main([], tmp_path) == 0
    text = (tmp_path / "Dockerfile").read_text()
    assert digests["base"] not in text
    assert text.count(hashlib.sha256(b'{"schemaVersion": 2, "new": 1}').hexdigest()) == 2


def test_no_file_changes_if_one_image_has_no_digest(
    tmp_path: Path, registry: tuple[str, type[Registry]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, handler = registry
    program, before = pin_images(), files(tmp_path, address)
    (tmp_path / "compose.yaml").write_text(f"image: {address}/base:4\n")
    assert program.main([], tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pin_images.py: {address}/base:4: ")
    assert "404" in said
    assert len(said.splitlines()) == 1
    handler.lie = True
    (tmp_path / "compose.yaml").write_text(before["compose.yaml"])
    assert program.main([], tmp_path) == 2
    assert "do not use it" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_a_manifest_without_end_is_not_read_to_its_end(
    tmp_path: Path, registry: tuple[str, type[Registry]], capsys: pytest.CaptureFixture[str]
) -> None:
    address, handler = registry
    program, before = pin_images(), files(tmp_path, address)
    handler.manifests = {**handler.manifests, ("base", "3"): bytes(program.MAX_BYTES + 1)}
    assert program.main([], tmp_path) == 2
    assert "a manifest of more than 4,194,304 bytes" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_a_token_goes_to_its_own_registry_only(tmp_path: Path, registry: tuple[str, type[Registry]]) -> None:
    address, handler = registry
    files(tmp_path, address)
    other = type("Other", (Registry,), {"asked": [], "tokens": [], "demanding": False})
    with served(ROOT, other) as handler.elsewhere:
        assert pin_images().main([], tmp_path) == 0
    assert any(handler.tokens), "it demands one"
    assert other.tokens == [""], "where it leads to"


def test_every_image_of_a_registry_is_one_that_is_pinned() -> None:
    """The program knows images by the lines that name them: it must miss none."""
    program = pin_images()
    for name in program.FILES:
        text = (INFRA / name).read_text()
        lines = re.findall(r"^\s*(?:FROM|image:)\s*(\S+)", text, re.MULTILINE)
        stages = {*re.findall(r" AS (\S+)$", text, re.MULTILINE), "scratch"}
        foreign = [each for each in lines if each not in stages and not each.startswith("${RESMASTER_IMAGE:-")]
        assert foreign
        found = [match["name"] for match in program.IMAGE.finditer(text)]
        assert [each.split(":")[0] for each in foreign] == [each for each in found if each != "docker/dockerfile"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("postgres", ("registry-1.docker.io", "library/postgres")),
        ("prefecthq/prefect", ("registry-1.docker.io", "prefecthq/prefect")),
        ("ghcr.io/a/b", ("ghcr.io", "a/b")),
        ("localhost:5000/a", ("localhost:5000", "a")),
    ],
)
def test_names_lead_to_their_registry(name: str, place: tuple[str, str]) -> None:
    assert pin_images().Image(name, "1").place == place
