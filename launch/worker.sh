#!/usr/bin/env bash
# Runs on each host of a TPU, in a folder with a bundle (launch/bundle.py); launch/tpu.py calls it over SSH.
#   bash launch/worker.sh install WHEEL PYTHON EXTRAS    an environment for the wheel, with the constraints
#   bash launch/worker.sh start [--again] [--secret NAME=SECRET:VERSION]... [NAME=VALUE]... -- COMMAND...
#   bash launch/worker.sh status                         one line: running, ended STATUS, lost, or not started
# A started command outlives the connection. It runs in this folder, through uwm_jax.supervise where it has a workdir.
# With --again it is well where it runs already. Above the folder lie run.log, its output; run.command; run.status, its
# exit status; run.lock, which it holds; secrets, variables with their values, which `start` reads and removes.
set -euo pipefail
cd "$(dirname "$0")/.."
state=$(cd .. && pwd)

install() {
  local wheel=$1 version=$2 extras=$3
  if [ ! -e env/installed ]; then
    rm -rf env
    if ! { command -v "python$version" > /dev/null && "python$version" -m venv env; }; then
      # The images of TPU VMs have an older Python; uv brings its own.
      rm -rf env
      command -v uv > /dev/null || python3 -m pip install --quiet --user uv
      PATH="$HOME/.local/bin:$PATH" uv venv --quiet --seed --python "$version" env
    fi
    env/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "./${wheel}[$extras]"
    touch env/installed
  fi
  ln -sfn "$(basename "$PWD")" "$state/current"
  echo "uwm_jax worker: installed $(env/bin/python -c 'import uwm_jax; print(uwm_jax.__version__)')"
}

start() {
  local again='' name value
  umask 077
  if [ -e "$state/secrets" ]; then
    set -a
    # shellcheck disable=SC1091
    . "$state/secrets"
    set +a
    rm -f "$state/secrets"
  fi
  if [ ! -e env/installed ]; then
    echo "uwm_jax worker: $(basename "$PWD") is not installed here: run launch.tpu install" >&2
    exit 2
  fi
  while [ "$1" != -- ]; do
    case $1 in
      --again) again=yes ;;
      --secret)
        shift
        name=${1#*=}
        value=$(gcloud secrets versions access "${name#*:}" --secret="${name%%:*}" --quiet)
        export "${1%%=*}=$value"
        ;;
      *) export "${1?}" ;;
    esac
    shift
  done
  shift
  exec 9>> "$state/run.lock"
  if ! flock --nonblock 9; then
    if [ -n "$again" ] && [ "$(cat "$state/run.command")" = "$*" ]; then
      echo "uwm_jax worker: running already"
      exit 0
    fi
    echo "uwm_jax worker: another run is running: $(cat "$state/run.command")" >&2
    exit 3
  fi
  rm -f "$state/run.status"
  echo "$*" > "$state/run.command"
  PATH="$PWD/env/bin:$PATH" setsid nohup bash launch/worker.sh run "$@" >> "$state/run.log" 2>&1 < /dev/null &
  echo "uwm_jax worker: started"
}

# The started command; it inherits the lock as descriptor 9.
run() {
  local supervisor=() status=0 argument
  for argument in "$@"; do
    case $argument in --workdir | --workdir=*) supervisor=(python -m uwm_jax.supervise --) ;; esac
  done
  trap : TERM HUP INT # the command gets these as well, and saves; its status is then noted
  date --utc +"started at %FT%TZ: $*"
  "${supervisor[@]}" "$@" || status=$?
  date --utc +"ended at %FT%TZ with status $status"
  echo "$status" > "$state/run.status"
}

status() {
  if [ ! -e "$state/run.lock" ]; then
    echo "uwm_jax worker: not started"
  elif ! flock --nonblock "$state/run.lock" true; then
    echo "uwm_jax worker: running"
  elif [ -e "$state/run.status" ]; then
    echo "uwm_jax worker: ended $(cat "$state/run.status")"
  else
    echo "uwm_jax worker: lost" # its host was started anew, or it was killed
  fi
}

"$@"
