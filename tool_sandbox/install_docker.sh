#!/usr/bin/env bash
# Makes `docker` answer: installs and starts the engine where that is safe to do unasked (root on Debian or Ubuntu).
set -euo pipefail

WAIT_S=60
LOG=/var/log/autotraj-dockerd.log

answers() { timeout 10 docker info >/dev/null 2>&1; }

answers && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  cat >&2 <<'TEXT'
The tool sandbox needs a running Docker engine, and `docker info` does not answer.
Install Docker (https://docs.docker.com/engine/install/), start it, and make sure that this user may use it
(group `docker`). As root on Debian or Ubuntu `make setup` does all of it.
TEXT
  exit 1
fi

if ! command -v dockerd >/dev/null; then
  echo "==> Docker engine (Debian package docker.io)"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends docker.io iptables >/dev/null
fi

if ! answers; then
  echo "==> starting dockerd (log: $LOG)"
  setsid nohup dockerd >"$LOG" 2>&1 </dev/null &
  for _ in $(seq "$WAIT_S"); do
    answers && exit 0
    sleep 1
  done
  echo "dockerd did not answer within ${WAIT_S} s; the end of its log:" >&2
  tail -n 20 "$LOG" >&2
  exit 1
fi
