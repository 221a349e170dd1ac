#!/usr/bin/env bash
# Fetches what `python -m benchmarks.gpu` needs on a bare GPU machine without a network, as wheels in .wheels/, checks how
# much travels in all, and prints the one command to run there. docs/gpu.md says what such a machine must bring itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}      # of here; any version
target=${TARGET_PYTHON:-3.12}  # of there
limit_mib=64
folder=.wheels
# Each with what it needs, apart from what such a machine has.
packages=(diffusers importlib_metadata lazy_importer zipp pydantic pydantic_core annotated_types typing_inspection typing_extensions resvg_py torchao)
platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)

# A package as pip takes it: at the version that constraints.txt pins, else at those that pyproject.toml allows.
pinned() {
  grep -iE "^${1//_/[-_]}==" constraints.txt || { grep -oE "\"${1}[<>=][^\"]*\"" pyproject.toml | tr -d '"'; } || echo "$1"
}

mkdir -p "$folder"
rm -f "$folder"/*.whl
wanted=()
for name in "${packages[@]}"; do wanted+=("$(pinned "$name")"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$target" --implementation cp \
  "${platforms[@]/#/--platform=}" --platform=any --dest "$folder" "${wanted[@]}"

twice=$(cd "$folder" && printf '%s\n' *.whl | cut -d- -f1 | sort | uniq -d)
[ -z "$twice" ] || { echo "gpu_wheels.sh: two versions of $twice in $folder" >&2; exit 1; }
[ "$(printf '%s\n' "$folder"/*.whl | wc -l)" -eq "${#packages[@]}" ] || { echo "gpu_wheels.sh: a wheel is missing in $folder" >&2; exit 1; }

bytes=$({ git ls-files -z; printf '%s\0' "$folder"/*.whl; } | xargs -0 stat --format %s | awk '{ sum += $1 } END { print sum }')
mib=$(((bytes + 1048575) / 1048576))
ls -l "$folder" | awk 'NR > 1 { printf "%8.1f MiB  %s\n", $5 / 1048576, $NF }'
echo "$mib MiB travel: tracked files and $folder"
[ "$mib" -le "$limit_mib" ] || { echo "gpu_wheels.sh: more than the $limit_mib MiB that may travel" >&2; exit 1; }

command="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site $folder/*.whl && \
PYTHONPATH=/tmp/site PYTHONUNBUFFERED=1 python3 -m benchmarks.gpu --seconds 520 --out \"\${OUT:-out/gpu}\""
[ "${#command}" -le 2000 ] || { echo "gpu_wheels.sh: the command has ${#command} characters" >&2; exit 1; }
printf 'There, in the root of this repository:\n%s\n' "$command"
