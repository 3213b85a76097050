# Make .venv and install this package into it: `. scripts/_setup.sh EXTRAS`, e.g. "" or "test".
# Sets $python. Does nothing when .venv already holds what pyproject.toml asks for. PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

gpu_extra() { # the build of MLX for this machine
  if [ "$(uname -s)" != Linux ]; then
    echo ""
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo cuda13
  else
    echo cpu
  fi
}

fast_blas() { # MLX's Linux CPU build needs OpenBLAS to be usable; the package loads it
  [ "$1" = cpu ] || return 0
  if "$python" -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null; then return 0; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing libopenblas0 (without it, MLX computes about 30 times slower here)."
    { apt-get install -y -qq libopenblas0 || { apt-get update -qq && apt-get install -y -qq libopenblas0; }; } \
      >/dev/null 2>&1 || say "That failed; the program works, but slowly."
  else
    say "For speed, install OpenBLAS: sudo apt-get install libopenblas0"
  fi
}

set_up() {
  local extra extras wanted stamp=.venv/.installed
  extra=$(gpu_extra)
  extras=$(printf '%s,%s' "$1" "$extra" | sed 's/^,//; s/,$//')
  python=$PWD/.venv/bin/python
  wanted=$({ cat pyproject.toml; echo "$extras $PWD"; } | cksum)
  if [ -x "$python" ] && [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    fast_blas "$extra"
    return
  fi
  if command -v uv >/dev/null; then
    "$python" -c '' 2>/dev/null || uv venv --quiet --clear --python "${PYTHON:->=3.11}" .venv
    say "Installing into .venv with uv"
    uv pip install --quiet --python "$python" -e ".${extras:+[$extras]}"
  else
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      local base
      base=$(find_python) || {
        say "Error: Python 3.11 or newer (with venv) is needed, or uv."
        say "Hint: macOS: brew install python; Debian, Ubuntu: sudo apt-get install python3-venv; or https://docs.astral.sh/uv"
        exit 1
      }
      rm -rf .venv
      "$base" -m venv .venv
    fi
    say "Installing into .venv with pip"
    "$python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  fi
  fast_blas "$extra"
  touch "$stamp"
  echo "$wanted" >>"$stamp"
}

set_up "$1"
