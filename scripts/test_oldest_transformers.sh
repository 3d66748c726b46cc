#!/usr/bin/env bash
# test_oldest_transformers.sh [PYTEST_ARGS]: the tests of what meets transformers, with the oldest release that is
# supported, in .venv-oldest; everything else in it is .venv's.
set -euo pipefail
cd -P "$(dirname "$0")/.."
RELEASE=${OLDEST_TRANSFORMERS:-4.57.1}
venv=$PWD/.venv-oldest
if [[ $(cat "$venv/release" 2>/dev/null) != "$RELEASE" ]]; then
  rm -rf "$venv"
  .venv/bin/python -m venv "$venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "transformers==$RELEASE"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  .venv/bin/python -c '
import sysconfig
folder = sysconfig.get_path("purelib")
print(f"import site; site.addsitedir({folder!r})")' >"$site/zz_packages_of_venv.pth"
  echo "$RELEASE" >"$venv/release"
fi
"$venv/bin/python" -c "
import transformers
assert transformers.__version__ == '$RELEASE', transformers.__version__
print('transformers', transformers.__version__)"
"$venv/bin/python" -m pytest -q tests/test_integration_transformers.py tests/test_nn.py "$@"
