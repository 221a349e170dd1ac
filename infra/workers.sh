#!/usr/bin/env bash
# Prefect workers of this machine, each started again when it ends: one for builds, or one per GPU for shards.
#
#   infra/workers.sh builds        builds and repairs, which only wait: up to 8 of them at a time
#   infra/workers.sh shards [N]    N workers that take one run at a time (default: the number of GPUs, else 1)
#
# SIGTERM or SIGINT stops them, and what they run. Reads PREFECT_API_URL, and PREFECT (the program; default: prefect of
# .venv, or on PATH). Builds count the workers that are online and not named HOST-builds-..., to give each of them work.
set -u

pool=resmaster-process
case ${1:-} in
  builds) count=1 arguments=(--work-queue builds --limit 8) ;;
  shards)
    gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
    count=${2:-$((gpus > 0 ? gpus : 1))} arguments=(--work-queue gpu-repair --work-queue gpu --limit 1)
    ;;
  *) echo "usage: infra/workers.sh builds | shards [N]" >&2; exit 2 ;;
esac

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefect=${PREFECT:-}
[ -n "$prefect" ] || { [ -x "$home/.venv/bin/prefect" ] && prefect=$home/.venv/bin/prefect; } || prefect=prefect
command -v "$prefect" >/dev/null || { echo "workers.sh: no program $prefect; run make install, or set PREFECT" >&2; exit 2; }

# One worker, again and again. `env` gives it back the signals that a background process of a script would ignore.
supervise() {
  trap 'kill -TERM "$worker" 2>/dev/null; wait "$worker"; exit 0' TERM
  [ "${gpus:-0}" -gt 0 ] && export CUDA_VISIBLE_DEVICES=$(($1 % gpus))
  while :; do
    env --default-signal=INT,TERM "$prefect" worker start --pool "$pool" --name "$(hostname)-$role-$$-$1" "${arguments[@]}" &
    worker=$!
    wait "$worker"
    echo "workers.sh: worker $role-$1 ended; it is started again" >&2
    sleep 2
  done
}

role=$1 pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((i = 0; i < count; i++)); do
  supervise "$i" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
done
