#!/usr/bin/env bash
# Unpacks Debian's `prometheus` into a folder for the tests: nothing is installed, no service is started.
# Without apt there is nothing to do: the tests say what they leave out.
set -euo pipefail

FOLDER=$1
BINARY=$FOLDER/usr/bin/prometheus

if command -v prometheus >/dev/null || [ -x "$BINARY" ] || ! command -v apt-get >/dev/null; then
  exit 0
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
echo "==> Debian's package prometheus, for the tests"
if ! apt-get download -qq prometheus 2>/dev/null; then
  if [ "$(id -u)" -eq 0 ]; then
    apt-get update -qq
    apt-get download -qq prometheus 2>/dev/null
  else
    echo "apt-get can't download the package prometheus; the tests go without it" >&2
    exit 0
  fi
fi
cd - >/dev/null
mkdir -p "$FOLDER"
dpkg-deb --extract "$scratch"/prometheus_*.deb "$FOLDER"
"$BINARY" --version 2>&1 | head -1
