#!/usr/bin/env bash
# Tests the oldest versions of the dependencies that setup.py allows, or the newest, in a
# virtual environment of their own; build/sbom-*.json is its bill of materials.
#   bash scripts/versions.sh oldest|newest [ARGS]   ARGS go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
which=${1:?oldest or newest}
shift
venv=.venv-$which
python=$(find_python)
"$python" -m venv --clear "$venv"
if [[ "$which" == oldest ]]; then
  # Every lower bound becomes the version itself.
  "$python" -c '
import re, setuptools
setuptools.setup = lambda **given: print(
  *(re.sub(r">=([^,]*).*", r"==\1", x)
    for x in (*given["install_requires"], *given["extras_require"]["text"])), sep="\n")
exec(open("setup.py").read())
' >"$venv/constraints.txt"
else
  : >"$venv/constraints.txt"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$venv/constraints.txt" '.[text]'
"$python" -m venv build/tools
build/tools/bin/python -m pip install --quiet --disable-pip-version-check \
  'cyclonedx-bom>=7,<8'
build/tools/bin/cyclonedx-py environment "$venv" --output-file "build/sbom-$which.json"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check pytest pytest-xdist
exec "$venv/bin/python" -m pytest "${@:-tests/golden_test.py}" -m ''
