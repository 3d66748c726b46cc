"""missing.py GROUP...: prints the requirements of these groups that this Python does not meet.

A group is `build` (what compiling needs), `run` (the package's dependencies) or one of the extras
in pyproject.toml.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib
from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def build_requirements() -> list[str]:
    sys.path.insert(0, str(ROOT / "build_backend"))
    from gemma2_build import BUILD_TOOLS, on_path

    # Building in place makes no wheel, so an older setuptools serves as well.
    tools = {**BUILD_TOOLS, "setuptools": "setuptools>=64"}
    return [requirement for name, requirement in tools.items() if not on_path(name)]


def is_met(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in sys.argv[1:]:
        if group == "build":
            requirements = build_requirements()
        elif group == "run":
            requirements = project["dependencies"]
        else:
            requirements = project["optional-dependencies"][group]
        for requirement in requirements:
            if not is_met(Requirement(requirement)):
                print(requirement)


main()
