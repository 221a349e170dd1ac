"""The names of this project's deployments: `resmaster-ROLE`, and `-KIND` for pools of another kind than `process`."""

from __future__ import annotations

import re

KINDS = ("process", "docker", "kubernetes")
"""Kinds of work pools. The first one is the default."""
ROLES = {
    "build-dataset": "build",
    "process-shards": "shards",
    "repair": "repair",
    "publish": "publish",
    "compare": "compare",
    "overview": "overview",
}
"""Flow -> what its deployments are called."""


def deployment_name(flow: str, kind: str) -> str:
    """The name of the deployment of a flow for a kind of pool."""
    return f"resmaster-{ROLES[flow]}{_suffix(kind)}"


def shards_beside(name: str | None) -> str:
    """The name of the deployment of `process-shards` that belongs to a build of another deployment, or of none."""
    found = re.fullmatch(rf"resmaster-[a-z]+?-({'|'.join(KINDS[1:])})", name or "")
    return deployment_name("process-shards", found[1] if found else KINDS[0])


def _suffix(kind: str) -> str:
    return "" if kind == KINDS[0] else f"-{kind}"
