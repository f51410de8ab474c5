#!/bin/sh
# make_venv.sh FOLDER [PYTHON]: creates an empty virtual environment with pip. PYTHON, where given, is used; otherwise
# the first Python from 3.11 to 3.14 that is found. Debian and Ubuntu ship python3 without ensurepip unless python3-venv
# is installed; there the pip of that Python fills the environment instead.
set -eu

folder=$1
python=${2:-}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

if [ -n "$python" ]; then
  if ! is_supported "$python"; then
    echo "make_venv: PYTHON=$python is not a Python from 3.11 to 3.14" >&2
    exit 1
  fi
else
  for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if is_supported "$candidate"; then
      python=$candidate
      break
    fi
  done
fi
if [ -z "$python" ]; then
  echo "make_venv: no Python from 3.11 to 3.14 was found; install one, or name it: make env PYTHON=/path/to/python3" >&2
  exit 1
fi

if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  "$python" -m venv --clear "$folder"
elif "$python" -c 'import venv, pip' 2>/dev/null; then
  "$python" -m venv --clear --without-pip "$folder"
  "$python" -m pip --quiet --python "$folder/bin/python" install pip
else
  echo "make_venv: $("$python" --version) has neither ensurepip nor pip; on Debian and Ubuntu: apt install python3-venv" >&2
  exit 1
fi
