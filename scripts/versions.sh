#!/usr/bin/env bash
# Tests the oldest versions of the dependencies that setup.py allows, or the newest, or
# the newest with a JAX between them, whose XLA compiles loops in another way. Each has a
# virtual environment of its own; build/sbom-*.json is its bill of materials. The site is
# built without running its pages.
#   bash scripts/versions.sh oldest|middle|newest [ARGS]   ARGS go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
which=${1:?oldest, middle or newest}
shift
venv=.venv-$which
extras=benchmark,docs,text
python=$(find_python)
if [[ "$which" == oldest ]]; then
  # The oldest versions of some packages have no wheels for later versions of Python.
  python=$(command -v python3.11 || echo "$python")
fi
"$python" -m venv --clear "$venv"
if [[ "$which" == oldest ]]; then
  # Every lower bound becomes the version itself.
  "$python" -c '
import re, runpy, setuptools, sys

def setup(install_requires, extras_require, **unused):
  extras = [extras_require[name] for name in sys.argv[1].split(",")]
  for requirement in {*install_requires, *sum(extras, [])}:
    print(re.sub(r">=([^,]*).*", r"==\1", requirement))

setuptools.setup = setup
runpy.run_path("setup.py")
' "$extras" >"$venv/constraints.txt"
elif [[ "$which" == middle ]]; then
  printf '%s\n' jax==0.10.2 jaxlib==0.10.2 >"$venv/constraints.txt"
else
  : >"$venv/constraints.txt"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint "$venv/constraints.txt" ".[$extras]"
"$python" -m venv --clear build/tools
build/tools/bin/python -m pip install --quiet --disable-pip-version-check \
  'cyclonedx-bom>=7,<8'
build/tools/bin/cyclonedx-py environment "$venv" --output-file "build/sbom-$which.json"
# Without a kernel, the language of the pages' code is unknown.
"$venv/bin/python" -m sphinx -W -q -b dummy -D nb_execution_mode=off \
  -D suppress_warnings=myst-nb.lexer,myst.xref_missing,ref.python docs build/site
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check pytest pytest-xdist
tests=(tests/{golden,codecs,codec}_test.py)
exec "$venv/bin/python" -m pytest "${@:-${tests[@]}}" -m ''
