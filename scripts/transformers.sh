#!/usr/bin/env bash
# Checks decoded checkpoints in transformers, in an environment of its own.
#   bash scripts/transformers.sh            the newest version
#   bash scripts/transformers.sh 4.57.6     that version
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:-}
venv=.venv-transformers${version:+-$version}
if [[ ! -x $venv/bin/python ]]; then
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    --editable . torch "transformers${version:+==$version}"
fi
exec "$venv/bin/python" -m scripts.transformers_check
