#!/usr/bin/env bash
# Writes infra/locks/NAME.lock: every package that the image installs, with its version and the sha256 of its file.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: infra/lock.sh [NAME [URL]]

  NAME  the lock to write: infra/locks/NAME.lock     (default: cuda)
  URL   the index of other builds of PyTorch, which is asked beside the package index, e.g. of the builds for CPUs

The image has the extras pipeline and s3. Versions are those of constraints.txt. Nothing is installed. Needs Linux and Python 3.11, as the image has; elsewhere:
  docker run --rm -v "$PWD:/src" -w /src python:3.11-slim-bookworm infra/lock.sh
The package index is the one that pip is set up for. The program: PYTHON (default: python of .venv, or python3).
TEXT
}

fail() {
  echo "lock.sh: $*" >&2
  exit 2
}

case ${1:-} in
  help | -h | --help) usage; exit ;;
  -*) fail "unknown option $1; see: infra/lock.sh help" ;;
esac
[ $# -le 2 ] || fail "too many words; see: infra/lock.sh help"
name=${1:-cuda} url=${2:-}
[[ $name =~ ^[a-z0-9-]+$ ]] || fail "$name: use small letters, digits and dashes for a name"
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
[ -n "$python" ] || { [ -x "$home/.venv/bin/python" ] && python=$home/.venv/bin/python; } || python=python3
has=$("$python" -c 'import platform; print(platform.system(), *platform.python_version_tuple()[:2])') || fail "$python does not run; set PYTHON"
[ "$has" = "Linux 3 11" ] || fail "the image has Linux and Python 3.11, and this is $has; see: infra/lock.sh help"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" - "$home/pyproject.toml" >"$work/requirements.txt" <<'PYTHON'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["pipeline"], *extras["s3"], sep="\n")
PYTHON
"$python" -m pip install --quiet --dry-run --ignore-installed --only-binary :all: --report "$work/report.json" \
  -c "$home/constraints.txt" ${url:+--extra-index-url "$url"} -r "$work/requirements.txt" ||
  fail "pip finds no set of packages; its message is above"
"$python" - "$work/report.json" "$url" >"$work/lock" <<'PYTHON'
import json, platform, re, sys

lines = []
for each in json.load(open(sys.argv[1]))["install"]:
    name, version = each["metadata"]["name"], each["metadata"]["version"]
    digest = each["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    if not digest:
        sys.exit(f"lock.sh: {name} {version}: the index names no sha256; use an index that does")
    if "+" in version and not sys.argv[2]:
        sys.exit(f"lock.sh: {name} {version} is no build of the package index; unset PIP_FIND_LINKS and what pip's "
                 "configuration adds, or give the URL of its index and another NAME")
    lines.append(f"{re.sub('[-_.]+', '-', name).lower()}=={version} --hash=sha256:{digest}")
print(f"# Written by infra/lock.sh with Python {platform.python_version()} on Linux {platform.machine()}, for pip install --require-hashes.")
print(*sorted(lines, key=lambda line: line.split("==")[0]), sep="\n")
PYTHON
mkdir -p "$home/infra/locks"
mv "$work/lock" "$home/infra/locks/$name.lock"
chmod 644 "$home/infra/locks/$name.lock"
echo "written: infra/locks/$name.lock ($(grep -c '==' "$home/infra/locks/$name.lock") packages)"
