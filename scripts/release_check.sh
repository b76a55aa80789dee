#!/usr/bin/env bash
# Builds the sdist and the wheel into dist/, and tries both outside the clone, in fresh
# environments of the oldest and the newest Python: the wheel there, with the notebooks
# that need nothing else, and the sdist here.
#   bash scripts/release_check.sh
# ROTBITS_JAX_ADDRESS is the address of the repository, see setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m venv --clear build/tools
build/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
rm -rf dist
build/tools/bin/python -m build --quiet --outdir dist .
build/tools/bin/python -m twine check --strict dist/*
root=$PWD
dist=$root/dist
for version in 3.11 3.13; do
  folder=$(mktemp -d)
  "python$version" -m venv "$folder/venv"
  case $version in
  3.11) package=("$dist"/*.whl) ;;
  *) package=("$dist"/*.tar.gz) ;;
  esac
  "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "${package[0]}"
  (
    cd "$folder"
    export PATH=$folder/venv/bin:$PATH XDG_CACHE_HOME=$folder/cache
    unset PYTHONPATH PYTHONHOME
    rotbits --version
    example=$(python -c 'import rotbits_jax; print(rotbits_jax.checkpoints.example())')
    [[ $example == "$folder"/* ]]
    rotbits encode "$example" x.rotbits --config=free
    rotbits verify x.rotbits --against="$example"
    snapshot=$(rotbits snapshot x.rotbits)
    [[ -f $snapshot/modeling_sliced.py ]]
    if [[ $version == 3.11 ]]; then
      python -m pip install --quiet --disable-pip-version-check ipykernel nbclient matplotlib
      cp "$root"/colabs/0[12346]_*.ipynb .
      jupyter execute 0*.ipynb
    fi
  )
  rm -rf "$folder"
done
