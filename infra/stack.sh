#!/usr/bin/env bash
# A whole stack on this machine, without containers, for development: SeaweedFS, a Prefect server on SQLite, the
# deployments, workers (one for builds, one for shards), and a page over the datasets. `make up` and `make down` call it.
set -euo pipefail
own_umask=$(umask)
umask 077 # passwords, logs and databases are for nobody else on this machine

usage() {
  cat <<'TEXT'
usage: infra/stack.sh up|down|status [--dir DIR] [--port PORT] [--store-port PORT] [--view-port PORT]

  up      start what does not run yet, deploy, wait until workers are there
  down    stop all of it, and the runs at work; data stay in DIR
  status  exit 0 if all of it runs, else 1

  --dir         where its data, logs and process ids are   (default: out/stack)
  --port        port of the Prefect server and its UI      (default: 4200)
  --store-port  port of the S3 store                       (default: 8333)
  --view-port   port of the page over the datasets         (default: 4280)

DIR/env holds what a shell needs to use it:  source out/stack/env
The first `up` makes the passwords of server and store, which DIR/env keeps. The UI asks for PREFECT_API_AUTH_STRING.
RESMASTER_VIEW_URL is the page over the datasets, with its token.
TEXT
}

fail() {
  echo "stack.sh: $*" >&2
  exit 2
}

[ $# -gt 0 ] || { usage >&2; exit 2; }
verb=$1
shift
dir=out/stack port=4200 store_port=8333 view_port=4280
while [ $# -gt 0 ]; do
  case $1 in
    --dir | --port | --store-port | --view-port)
      [ $# -gt 1 ] || fail "$1 needs a value"
      name=${1#--}
      declare "${name//-/_}=$2"
      shift 2
      ;;
    *) fail "unknown option $1; see: infra/stack.sh help" ;;
  esac
done
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$home/.venv/bin/python}
wait_seconds=180

# The process id that was kept for a name, if that process is alive and ours.
alive() {
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) && [ -n "$pid" ] && [[ $(ps -wwo args= -p "$pid" 2>/dev/null) == *"$2"* ]] && echo "$pid"
}

# Start a command in a session of its own, so that it can be ended with all that it has started. Its log is private. What
# it writes has the umask that is given: runs may write datasets to folders, which are shared as the user's umask says.
launch() {
  local name=$1 mask=$2
  shift 2
  touch "$dir/$name.log" && chmod 600 "$dir/$name.log"
  (umask "$mask" && exec setsid env --default-signal=INT,TERM "$@") >>"$dir/$name.log" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

server_answers() {
  "$python" -c "import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)" "$PREFECT_API_URL/health" 2>/dev/null
}

# How many workers the server knows to be there.
workers_there() {
  "$python" - <<'PYTHON'
import base64, json, os, urllib.request
password = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
request = urllib.request.Request(
    os.environ["PREFECT_API_URL"] + "/work_pools/resmaster-process/workers/filter",
    b"{}",
    {"Content-Type": "application/json", "Authorization": f"Basic {password}"},
)
workers = json.load(urllib.request.urlopen(request, timeout=5))
print(sum(worker["status"] == "ONLINE" for worker in workers))
PYTHON
}

until_true() {
  local deadline=$((SECONDS + wait_seconds))
  until "$@"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.5
  done
}

# The value of a variable in DIR/env, or else a new random one.
kept() {
  local value
  value=$(unset "$1"; [ ! -r "$dir/env" ] || source "$dir/env"; echo "${!1:-}")
  echo "${value:-$("$python" -c 'import secrets; print(secrets.token_urlsafe(24))')}"
}

# The address of the page over the datasets, if it is there.
view_url() {
  alive view "cli.main view" >/dev/null && sed -n 's/^view: //p' "$dir/view.log" | tail -n 1
}

write_env() {
  local password key=${AWS_ACCESS_KEY_ID:-resmaster} secret view
  view=$(view_url || true)
  password=$(kept PREFECT_API_AUTH_STRING) && secret=${AWS_SECRET_ACCESS_KEY:-$(kept AWS_SECRET_ACCESS_KEY)}
  [[ $password == *:* ]] || password=resmaster:$password
  {
    printf 'export PREFECT_API_URL=http://127.0.0.1:%s/api PREFECT_HOME=%q\n' "$port" "$dir/prefect"
    printf 'export PREFECT_API_AUTH_STRING=%q\n' "$password"
    printf 'export RESMASTER_ROOT=s3://datasets AWS_ENDPOINT_URL=http://127.0.0.1:%s AWS_REGION=us-east-1\n' "$store_port"
    printf 'export AWS_ACCESS_KEY_ID=%q AWS_SECRET_ACCESS_KEY=%q\n' "$key" "$secret"
    printf 'export RESMASTER_VIEW_TOKEN=%q\n' "$(kept RESMASTER_VIEW_TOKEN)"
    [ -z "$view" ] || printf 'export RESMASTER_VIEW_URL=%q\n' "$view"
    printf 'export PATH=%q:"$PATH"\n' "$(cd "$(dirname "$python")" && pwd)"
  } >"$dir/env.new"
  mv "$dir/env.new" "$dir/env" # never readable for others, not for a moment
  # shellcheck disable=SC1091
  source "$dir/env"
}

# The workers' runs link to this page. A stack does without it if it does not come up.
start_view() {
  alive view "cli.main view" >/dev/null && return 0
  : >"$dir/view.log"
  launch view "$own_umask" "$python" -m resmaster_flows.cli.main view "$RESMASTER_ROOT" --no-open --port "$view_port"
  settled() { [ -n "$(view_url)" ] || ! alive view "cli.main view" >/dev/null; }
  until_true settled || true
  [ -n "$(view_url)" ] || echo "stack.sh: no page over the datasets: $(tail -n 1 "$dir/view.log")" >&2
  write_env
}

up() {
  [ -x "$python" ] || fail "$python: no such program; run: make install"
  mkdir -p "$dir/prefect" "$dir/store" && chmod 700 "$dir/prefect" "$dir/store"
  write_env
  export PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false
  export PREFECT=${python%/*}/prefect WEED=${WEED:-${python%/*}/weed}
  "$home/infra/seaweedfs.sh" start --dir "$dir/store" --port "$store_port" --bucket datasets
  start_view
  if ! alive server "prefect server start" >/dev/null; then
    ! server_answers || fail "port $port is taken by another server; give a free one with --port"
    PREFECT_SERVER_API_AUTH_STRING=$PREFECT_API_AUTH_STRING launch server 077 "$python" -m prefect server start --host 127.0.0.1 --port "$port"
  fi
  until_true server_answers || fail "the Prefect server does not answer on port $port; see $dir/server.log"
  (cd "$home" && "$python" -m resmaster_flows.deploy --pool process)
  for role in builds shards; do
    alive "$role" "workers.sh $role" >/dev/null || launch "$role" "$own_umask" "$home/infra/workers.sh" "$role" $([ $role = shards ] && echo 1)
  done
  all_workers() { [ "$(workers_there 2>/dev/null)" -ge 2 ] 2>/dev/null; }
  until_true all_workers || fail "the workers do not come up; see $dir/builds.log and $dir/shards.log"
  [ -z "${RESMASTER_VIEW_URL:-}" ] || echo "datasets: $RESMASTER_VIEW_URL"
  echo "ready: http://127.0.0.1:$port (to use it: source $(printf %q "$dir/env"); the UI asks for PREFECT_API_AUTH_STRING, which is there)"
}

# Stop a session: asked first, then ended, with whatever it has started.
stop() {
  local name=$1 pid
  pid=$(alive "$name" "$2") || { rm -f "$dir/$name.pid"; return 0; }
  kill -TERM "$pid" 2>/dev/null || true
  for _ in $(seq 60); do
    [ -n "$(session "$pid")" ] || break
    sleep 0.5
  done
  # shellcheck disable=SC2046
  kill -KILL $(session "$pid") 2>/dev/null || true
  rm -f "$dir/$name.pid"
  echo "$name stopped"
}

# The processes of a session that are not dead yet.
session() {
  ps -eo pid=,sess=,stat= | awk -v sess="$1" '$2 == sess && $3 !~ /^Z/ { print $1 }'
}

down() {
  stop shards "workers.sh shards"
  stop builds "workers.sh builds"
  stop view "cli.main view"
  stop server "prefect server start"
  "$home/infra/seaweedfs.sh" stop --dir "$dir/store" --port "$store_port"
}

status() {
  local missing=0
  for each in "server:prefect server start" "builds:workers.sh builds" "shards:workers.sh shards"; do
    if alive "${each%%:*}" "${each#*:}" >/dev/null; then echo "${each%%:*}: runs"; else echo "${each%%:*}: does not run"; missing=1; fi
  done
  if alive view "cli.main view" >/dev/null; then echo "view: runs"; else echo "view: does not run"; fi
  "$home/infra/seaweedfs.sh" status --dir "$dir/store" --port "$store_port" || missing=1
  return $missing
}

case $verb in
  up | down | status) mkdir -p "$dir" && dir=$(cd "$dir" && pwd) || fail "$dir: cannot be made" ;;&
  up) up ;;
  down) down ;;
  status) status ;;
  help | -h | --help) usage ;;
  *) fail "unknown command $verb; see: infra/stack.sh help" ;;
esac
