#!/usr/bin/env bash
# check_packages.sh: builds the sdist and, from it alone, a wheel; checks what is in them; runs the wheel elsewhere.
set -euo pipefail
cd -P "$(dirname "$0")/.."
python=$PWD/.venv/bin/python folder=$PWD/build/packages
export GEMMA2_EXT_CPU_ISAS="scalar;avx2" # enough to see that a package builds and runs
rm -rf "$folder"
mkdir -p "$folder/elsewhere"
"$python" -c "
import sys
sys.path.insert(0, 'build_backend')
import gemma2_build
gemma2_build.build_sdist('$folder')
" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
mkdir "$folder/source"
tar -xf "$folder"/*.tar.gz -C "$folder/source" --strip-components=1
# What .ci/run has compiled already is the same here but for the sources' folder.
export CCACHE_BASEDIR=$folder/source/csrc
"$python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$folder" "$folder/source"
"$python" - "$folder" <<'EOP'
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

folder = Path(sys.argv[1])
(sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
with tarfile.open(sdist) as file:
    in_sdist = {member.name.split("/", 1)[1] for member in file if member.isfile()}
with zipfile.ZipFile(wheel) as file:
    in_wheel = set(file.namelist())
package = {
    *("gemma2_ext/py.typed", "gemma2_ext/_C.pyi", "gemma2_ext/ops/attention.py"),
    *(f"gemma2_ext/models/shakespeare/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
}
tracked = set(subprocess.check_output(["git", "ls-files"], text=True).split()) - {".gitignore"}
generated = {n for n in in_sdist if n in ("PKG-INFO", "setup.cfg") or n.startswith("python/gemma2_ext.egg-info/")}
assert not tracked - in_sdist, f"the sdist lacks {tracked - in_sdist}"
assert in_sdist == tracked | generated, f"the sdist has {in_sdist - tracked - generated}"
assert not package - in_wheel, f"the wheel lacks {package - in_wheel}"
stray = {n for n in in_wheel if not n.startswith(("gemma2_ext/", "gemma2_ext-")) or n.endswith((".cpp", ".h", ".pyc"))}
assert not stray, f"the wheel has {stray}"
libraries = [n for n in in_wheel if n.endswith(".so")]
assert len(libraries) == 1 and libraries[0].startswith("gemma2_ext/_C."), libraries
# What `twine check` and an index look at: the metadata, strictly.
with zipfile.ZipFile(wheel) as file:
    text = file.read(next(n for n in in_wheel if n.endswith(".dist-info/METADATA")))
metadata = Metadata.from_email(text, validate=True)
assert metadata.description_content_type == "text/markdown" and metadata.description.startswith("# gemma2_ext")
print(f"{sdist.name}: {len(in_sdist)} files; {wheel.name}: {len(in_wheel)} files, {wheel.stat().st_size / 1e6:.1f} MB")
EOP
"$python" -m pip install -q --disable-pip-version-check --no-deps --target "$folder/site" "$folder"/*.whl
cd "$folder/elsewhere"
PYTHONPATH=$folder/site "$python" -c "
import gemma2_ext
assert gemma2_ext.__file__.startswith('$folder/site'), gemma2_ext.__file__"
PYTHONPATH=$folder/site "$python" -m gemma2_ext generate --max-new-tokens 8 "ROMEO:"
