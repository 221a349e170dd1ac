"""Pins the container images that `infra/` names: each `name:tag` gets the digest that its registry gives now.

    python infra/pin_images.py            write name:tag@sha256:... into the files; again: bring the digests up to date
    python infra/pin_images.py --check    change nothing; exit status 1 if an image has no digest

A digest is the sha256 of the image's manifest: this program hashes what the registry sends, and compares that with the
digest which the registry names. Images that are built here (resmaster-pipeline) have no registry and are left alone.
Registries are asked as anybody is, without an account.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("Dockerfile", "compose.yaml", "kubernetes/worker.yaml")
IMAGE = re.compile(
    r"(?P<before>^\s*(?:FROM|image:|# syntax=)\s*[\"']?)(?P<name>[a-z0-9][\w./:-]*?):(?P<tag>[\w][\w.-]*)"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?(?=[\"'\s]|$)",
    re.MULTILINE,
)
MANIFESTS = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)
MAX_BYTES = 4 << 20
"""Registries refuse larger manifests."""
TIMEOUT_SECONDS = 30


class PinError(Exception):
    """An image cannot be pinned. The message says what to do next."""


@dataclass(frozen=True)
class Image:
    """An image as the files name it."""

    name: str
    tag: str

    @property
    def place(self) -> tuple[str, str]:
        """(registry, repository). A first part without a dot, a colon or `localhost` is a name at Docker Hub."""
        first, _, rest = self.name.partition("/")
        if rest and ("." in first or ":" in first or first == "localhost"):
            return first, rest
        return "registry-1.docker.io", self.name if rest else f"library/{self.name}"


def digest_of(image: Image) -> str:
    """The digest of an image's manifest: of all platforms, if the image has several. Raises PinError."""
    registry, repository = image.place
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1)(:|$)", registry) else "https"
    url = f"{scheme}://{registry}/v2/{repository}/manifests/{image.tag}"
    try:
        try:
            body, told = ask(url)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            body, told = ask(url, token(error.headers.get("WWW-Authenticate", "")))
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        reason = f"{registry} does not give it ({error}); check name, tag and network"
        raise PinError(f"{image.name}:{image.tag}: {reason}") from None
    found = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if told and told != found:
        reason = f"{registry} names {told}, and what it sends has {found}; do not use it"
        raise PinError(f"{image.name}:{image.tag}: {reason}")
    return found


def ask(url: str, bearer: str = "") -> tuple[bytes, str]:
    """(body, digest that the registry names, or "") of a manifest."""
    request = urllib.request.Request(url, headers={"Accept": MANIFESTS})
    if bearer:
        request.add_unredirected_header("Authorization", f"Bearer {bearer}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        body = answer.read(MAX_BYTES + 1)
        if len(body) > MAX_BYTES:
            raise ValueError(f"a manifest of more than {MAX_BYTES:,} bytes")
        return body, answer.headers.get("Docker-Content-Digest", "")


def token(challenge: str) -> str:
    """The token that a registry's challenge asks for, which anybody gets."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if not challenge.startswith("Bearer ") or "realm" not in fields:
        raise ValueError("it demands an account")
    query = urllib.parse.urlencode({key: fields[key] for key in ("service", "scope") if key in fields})
    with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT_SECONDS) as answer:
        found = json.loads(answer.read(MAX_BYTES))
    return str(found.get("token") or found["access_token"])


def pinned(text: str, digests: dict[Image, str]) -> str:
    """`text` with the digest of each image that it names. `digests` is filled as images are met."""

    def pin(match: re.Match[str]) -> str:
        image = Image(match["name"], match["tag"])
        if image not in digests:
            digests[image] = digest_of(image)
        return f"{match['before']}{image.name}:{image.tag}@{digests[image]}"

    return IMAGE.sub(pin, text)


def main(argv: Sequence[str] | None = None, folder: Path = HERE) -> int:
    """Entry point. Returns the exit status: 0 done, 1 an image has no digest, 2 an image cannot be pinned."""
    parser = argparse.ArgumentParser(prog="pin_images.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if an image has no digest")
    args = parser.parse_args(argv)
    texts = {folder / name: (folder / name).read_text(encoding="utf-8") for name in FILES}
    if args.check:
        bare = [
            f"{path.name}: {match['name']}:{match['tag']} has no digest"
            for path, text in texts.items()
            for match in IMAGE.finditer(text)
            if not match["digest"]
        ]
        print(*bare, "pin them: python infra/pin_images.py" if bare else "every image has a digest", sep="\n")
        return 1 if bare else 0
    digests: dict[Image, str] = {}
    try:
        changed = {path: pinned(text, digests) for path, text in texts.items()}
    except PinError as error:
        print(f"pin_images.py: {error}; nothing is changed", file=sys.stderr)
        return 2
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    for image, digest in digests.items():
        print(f"{image.name}:{image.tag}@{digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
