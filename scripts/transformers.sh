#!/usr/bin/env bash
# Checks decoded checkpoints in transformers, in an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-transformers
if [[ ! -x $venv/bin/python ]]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    --editable . torch transformers
fi
exec "$venv/bin/python" -m scripts.transformers_check
