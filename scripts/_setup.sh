# Make .venv and install this package into it: `. scripts/_setup.sh EXTRAS`, e.g. "" or "test".
# Sets $python. Does nothing when .venv already holds what pyproject.toml asks for. PYTHON chooses the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # Python keeps what it compiled: a tenth of what is installed is ever used

say() { printf '%s\n' "$*" >&2; }

# Whether an interpreter can carry MLX; says why not where pip would only say "No matching distribution".
usable() {
  local kind
  kind=$("$1" -c 'import platform, sys; print(sys.platform, platform.machine(), sys.version_info >= (3, 11))' 2>/dev/null) || return 1
  case $kind in
    darwin\ x86_64*)
      say "Skipping $(command -v "$1"): it runs as an Intel program, and MLX needs Apple silicon's own (arm64)."
      return 1 ;;
    *True) return 0 ;;
    *) return 1 ;;
  esac
}

find_python() { # the tested ones first; for newer ones there may be no wheels yet
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.14 python3.15 python3.16 python3.17 python3 python}; do
    if command -v "$candidate" >/dev/null && usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

require_macos() { # here, too, pip would only say "No matching distribution"
  local version
  [ "$(uname -s)" = Darwin ] || return 0
  version=$(SYSTEM_VERSION_COMPAT=0 sw_vers -productVersion)
  [ "${version%%.*}" -lt 14 ] || return 0
  say "Error: MLX needs macOS 14 or newer, and this is $version."
  exit 1
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

uv_python() { # what uv is to fetch: of this machine's own kind, also where uv itself runs under Rosetta
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
  elif [ "$(uname -s)" = Darwin ]; then
    echo cpython-3.13-macos-aarch64-none
  else
    echo 3.13
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
  require_macos
  if [ -e .venv ] && ! usable "$python"; then rm -rf .venv; fi # of another machine, or an interpreter that is gone
  if command -v uv >/dev/null; then
    if [ ! -x "$python" ]; then
      uv venv --quiet --python "$(find_python || uv_python)" .venv
    fi
    say "Installing into .venv with uv"
    uv pip install --quiet --python "$python" -e ".${extras:+[$extras]}"
  else
    if ! "$python" -m pip --version >/dev/null 2>&1; then
      local base
      base=$(find_python) && "$base" -c 'import venv, ensurepip' 2>/dev/null || {
        say "Error: Python 3.11 or newer (with venv) is needed${PYTHON:+, and '$PYTHON' is none}, or uv."
        say "Hint: macOS: brew install python; Debian, Ubuntu: sudo apt-get install python3-venv; or https://docs.astral.sh/uv"
        if [ "$(uname -sm)" = "Darwin x86_64" ]; then say "Hint: is this shell an Intel one? Try: arch -arm64 $0"; fi
        exit 1
      }
      rm -rf .venv
      "$base" -m venv .venv
    fi
    say "Installing into .venv with pip"
    "$python" -m pip install --quiet --no-compile --disable-pip-version-check -e ".${extras:+[$extras]}"
  fi
  fast_blas "$extra"
  touch "$stamp"
  echo "$wanted" >>"$stamp"
}

set_up "$1"
