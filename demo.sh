#!/usr/bin/env bash
# Encodes, decodes and evaluates a small trained model, and prints one table.
#   bash demo.sh            the whole text
#   bash demo.sh --quick    some of it: a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh
use_venv text
exec .venv/bin/python -m benchmarks.demo "$@"
