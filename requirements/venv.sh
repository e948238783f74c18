#!/bin/bash
# Usage: venv.sh DIRECTORY LOCK [INPUT OF uv pip install]...
# Makes a virtual environment that holds just what LOCK names, hashes checked; installs Debian's python3-venv if it is missing.
set -euo pipefail

directory=$1
lock=$2
shift 2

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or newer is needed (Debian 12's is), and python3 is $(python3 --version 2>&1): install it and run this again." >&2
  exit 1
fi
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" != 0 ]; then
    echo "Python's venv module is missing: install Debian's package python3-venv and run this again." >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends python3-venv >/dev/null
fi

[ -n "${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}" ] && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
export UV_SYSTEM_CERTS=1

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check --require-hashes \
  --requirement "$(dirname "$0")/../roles/images/files/dagster/uv.txt"
"$tools/bin/uv" venv --quiet --clear "$directory"
"$tools/bin/uv" pip install --quiet --python "$directory" --require-hashes --requirement "$lock" "$@"
