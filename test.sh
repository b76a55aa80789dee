#!/usr/bin/env bash
# Lints, type-checks and tests, in a virtual environment that it makes.
#   bash test.sh            the suite, minutes
#   bash test.sh --daily    the suite and one slow test of each kind, as CI runs it
#   bash test.sh --slow     the slow tests too
#   bash test.sh ARGS       other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/venv.sh
if [[ "${1:-}" == --slow ]]; then
  use_venv test,fuzz
  set -- -m '' "${@:2}"
  if ! .venv/bin/python -c 'import atheris' 2>/dev/null; then
    echo 'atheris has no wheel for this Python: nothing is fuzzed'
    set -- "$@" --deselect tests/fuzz_test.py::test_fuzz
  fi
else
  use_venv test
  if [[ "${1:-}" == --daily ]]; then
    set -- -m 'not slow or daily' "${@:2}"
  fi
fi
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# mypy runs beside the tests, because it needs one core only.
types=$(mktemp)
check=("$bin/mypy")
if ! "$bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
  echo 'types are not checked: the packages for Python 3.11 declare other ones'
  check=(true)
fi
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
"${check[@]}" >"$types" 2>&1 &
mypy=$!
code=0
"$bin/python" -m pytest "$@" || code=$?
wait "$mypy" || code=1
cat "$types"
exit "$code"
