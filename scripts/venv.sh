# Sourced by test.sh and demo.sh: use_venv EXTRAS makes .venv with this package and
# some of its extras, as in `test,fuzz`, or reuses it. Needs nothing but a Python >= 3.11
# with pip.

unset PYTHONPATH PYTHONHOME # another environment's packages
unset PYTHONDONTWRITEBYTECODE # or every process compiles JAX's modules anew, for 3 s

find_python() {
  local name
  for name in python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo 'Python 3.11 or later is needed, and none was found on PATH.' >&2
  return 1
}

make_venv() {
  local python
  python=$(find_python) || return
  echo "making .venv with $("$python" --version)"
  # Debian's Python lacks ensurepip; then the pip it does have installs one.
  "$python" -m venv --clear .venv >/dev/null 2>&1 || {
    "$python" -m venv --clear --without-pip .venv &&
      "$python" -m pip --quiet --python .venv/bin/python install pip
  }
}

use_venv() {
  local extras=$1 stamp=.venv/installed-$1
  .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv || return
  # What was installed stays good until the requirements change.
  if ! cmp -s setup.py "$stamp"; then
    echo "installing rotbits_jax[$extras] into .venv (minutes, the first time)"
    # Python compiles the modules that it imports, which are few of all.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
      --editable ".[$extras]" && cp setup.py "$stamp"
  fi
}
