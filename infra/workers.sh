#!/usr/bin/env bash
# Prefect workers of this machine, each started again when it ends: one for builds, or one per GPU for shards.
#
#   infra/workers.sh builds        builds and repairs, which only wait: up to 8 of them at a time
#   infra/workers.sh shards [N]    N workers that take one run at a time (default: the number of GPUs, else 1)
#
# SIGTERM or SIGINT stops them, and what they run. Reads PREFECT_API_URL, and PREFECT (the program; default: prefect of
# .venv, or on PATH). Builds count the workers that are online and not named HOST-builds-..., to give each of them work.
# A worker that keeps ending soon after its start is started again later and later, up to every 5 minutes.
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

soon_seconds=60 longest_delay=300
notes=$(mktemp -d) && trap 'rm -rf "$notes"' EXIT

# Passes on what a worker says, and keeps its last line: the reason, if the worker ends.
keep_last_line() {
  local line
  while IFS= read -r line; do
    printf '%s\n' "$line"
    [ -z "${line//[[:space:]]/}" ] || printf '%s' "$line" >"$1"
  done
}

# One worker, again and again. `env` gives it back the signals that a background process of a script would ignore.
supervise() {
  local note=$notes/$1 delay=1 begun status
  trap 'kill -TERM "$worker" 2>/dev/null; wait "$worker"; exit 0' TERM
  [ "${gpus:-0}" -gt 0 ] && export CUDA_VISIBLE_DEVICES=$(($1 % gpus))
  while :; do
    begun=$SECONDS && : >"$note"
    env --default-signal=INT,TERM "$prefect" worker start --pool "$pool" --name "$(hostname)-$role-$$-$1" "${arguments[@]}" \
      > >(keep_last_line "$note") 2>&1 &
    worker=$!
    wait "$worker"
    status=$?
    if [ $((SECONDS - begun)) -ge $soon_seconds ]; then delay=2; else delay=$((delay * 2 < longest_delay ? delay * 2 : longest_delay)); fi
    sleep 0.5 # its last words are on their way
    echo "workers.sh: worker $role-$1 ended after $((SECONDS - begun)) s (exit status $status): $(cat "$note"); it is started again in $delay s" >&2
    sleep "$delay" &
    worker=$!
    wait "$worker"
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
