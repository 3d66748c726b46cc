#!/usr/bin/env bash
# setup.sh [test] [lint]: .venv with what the package and these extras need, and the build in it. A second run finds
# everything in place within a second.
#
# Where PYTHON has torch >= 2.11, .venv sees that Python's packages, pip is called only for what they lack, and torch
# is never replaced. Elsewhere TORCH is installed.
set -euo pipefail
cd -P "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
VENV=$PWD/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'gemma2_ext: %s\n' "$@" >&2; }
fail() {
  say "$@"
  exit 1
}

# Names everything that is missing at once, with Debian's names for it.
check_machine() {
  local missing=() packages=() compiler=${CXX:-c++}
  lacks() {
    missing+=("  $1")
    packages+=("$2")
  }
  command -v git >/dev/null || lacks "git" git
  if ! command -v "$PYTHON" >/dev/null; then
    lacks "Python >= 3.10: '$PYTHON' was not found (PYTHON=... names another)" "python3 python3-dev python3-venv"
  elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    lacks "Python >= 3.10: '$PYTHON' is $("$PYTHON" -V 2>&1) (PYTHON=... names another)" python3
  else
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
      lacks "Python's headers: Python.h of '$PYTHON'" python3-dev
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || lacks "Python's venv and ensurepip, of '$PYTHON'" python3-venv
  fi
  if ! "$compiler" -std=c++17 -fsyntax-only -x c++ - 2>/dev/null \
    <<<'#include <optional>
        int main() { if constexpr (sizeof(int) > 1) return std::optional<int>(0).value(); }'; then
    lacks "a C++17 compiler: '$compiler' is none (CXX=... names another)" g++
  fi
  if ((${#missing[@]})); then
    fail "this machine lacks" "${missing[@]}" "on Debian: apt install ${packages[*]}"
  fi
}

# Of the Python given: program and version; the version of its torch, or an empty line; its package folders.
describe() {
  "$1" - <<'EOP'
import importlib.util, os, sys

version = ""
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    facts = {}
    with open(os.path.join(os.path.dirname(spec.origin), "version.py")) as file:
        exec(file.read(), facts)
    version = str(facts["__version__"])
print(os.path.realpath(sys.executable), sys.version.split()[0])
print(version)
for folder in sys.path:
    if os.path.basename(folder) in ("site-packages", "dist-packages"):
        print(folder)
EOP
}

is_recent() { # VERSION of torch
  [[ $1 =~ ^([0-9]+)\.([0-9]+) ]] || return 1
  local major=${BASH_REMATCH[1]} minor=${BASH_REMATCH[2]}
  ((major > 2 || (major == 2 && minor >= 11)))
}

# Not --system-site-packages: that would show the packages of the Python that PYTHON's own environment was made from.
see_packages_in() {
  local folder site
  # The old setuptools that comes with venv would hide the one at hand.
  if "$VENV/bin/python" -c 'import setuptools' 2>/dev/null; then
    "$VENV/bin/python" -m pip uninstall -q -y setuptools
  fi
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  for folder in "$@"; do
    "$PYTHON" -c 'import sys; print(f"import site; site.addsitedir({sys.argv[1]!r})")' "$folder"
  done >"$site/packages_of_the_python_at_hand.pth"
}

make_venv() {
  local text facts wanted key=$VENV/gemma2_ext.key
  [[ -e $VENV/gemma2_ext.built ]] || check_machine
  text=$(describe "$PYTHON") || fail "'$PYTHON' does not run (PYTHON=... names another)"
  mapfile -t facts <<<"$text"
  if [[ $("$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.prefix))') == "$VENV" ]]; then
    return # it is the active environment
  fi
  wanted="${facts[0]}, $TORCH"
  if is_recent "${facts[1]}"; then wanted="${facts[0]}, its torch ${facts[1]}"; fi
  if [[ -x $VENV/bin/python ]]; then
    # One without a key was made by hand, and is used as it is.
    if [[ ! -e $key || $(<"$key") == "$wanted" ]]; then return; fi
    say "$VENV was made for $(<"$key"); making it anew"
  fi
  check_machine
  say "creating $VENV for $wanted"
  rm -rf "$VENV"
  mkdir -p "$VENV"
  echo "nothing, since that was interrupted" >"$key" # until it is whole
  "$PYTHON" -m venv "$VENV"
  if is_recent "${facts[1]}"; then
    see_packages_in "${facts[@]:2}"
  elif ! "$VENV/bin/python" -m pip install -q "$TORCH"; then
    rm -rf "$VENV"
    fail "'$PYTHON' has no torch >= 2.11, and pip could not install $TORCH (see above)." \
      "TORCH=... names another version, PYTHON=... a Python that has torch."
  fi
  echo "$wanted" >"$key"
}

# install GROUP...: what these groups of requirements (see missing.py) lack, with torch held where it is.
install() {
  local text missing
  text=$("$VENV/bin/python" scripts/missing.py "$@") || exit 1
  [[ $text ]] || return 0
  mapfile -t missing <<<"$text"
  say "installing ${missing[*]}"
  "$VENV/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
    >"$VENV/gemma2_ext.constraints"
  "$VENV/bin/python" -m pip install -q --retries 1 -c "$VENV/gemma2_ext.constraints" "${missing[@]}" ||
    {
      say "missing, and pip could not install them: ${missing[*]}"
      return 1
    }
}

build() {
  local stamp=$VENV/gemma2_ext.built settings site
  local inputs=(CMakeLists.txt setup.py pyproject.toml build_backend cmake csrc "$VENV/pyvenv.cfg")
  settings="$PWD CXX=${CXX:-} $(env | grep '^GEMMA2_EXT_' | grep -v '^GEMMA2_EXT_CPU_ISA=' | sort || true)"
  if [[ -e $stamp && $(<"$stamp") == "$settings" && -z $(find "${inputs[@]}" -newer "$stamp") ]] &&
    compgen -G 'python/gemma2_ext/_C*.so' >/dev/null; then
    return
  fi
  check_machine
  say "building"
  rm -f "$stamp"
  echo "$settings" >"$stamp.new" # from before the build: what changes during it is built next time
  "$VENV/bin/python" setup.py -q egg_info build_ext --inplace
  # As `pip install --editable .` does, without what an older setuptools lacks for it.
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$PWD/python" >"$site/gemma2_ext.pth"
  printf '%s\n' "#!$VENV/bin/python" "import sys" "from gemma2_ext.cli import main" "sys.exit(main())" \
    >"$VENV/bin/gemma2-ext"
  chmod +x "$VENV/bin/gemma2-ext"
  mv "$stamp.new" "$stamp"
}

make_venv
install build run || exit 1
for extra in "$@"; do
  if ! install "$extra"; then
    [[ $extra == test ]] && "$VENV/bin/python" -c 'import pytest' || exit 1
    say "going on with the tests that do not need them"
  fi
done
build
