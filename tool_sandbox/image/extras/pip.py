"""Replaces pip, which can't work without a network. `pip install` of an installed package works silently; for any other it
prints one sentence, which lists the installed ones."""

from __future__ import annotations

import re
import sys
from importlib import metadata, util

PACKAGES = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "dateutil": "python-dateutil",
    "gmpy2": "gmpy2",
    "matplotlib": "matplotlib",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "numba": "numba",
    "numpy": "numpy",
    "openpyxl": "openpyxl",
    "pandas": "pandas",
    "pytest": "pytest",
    "requests": "requests",
    "scipy": "scipy",
    "seaborn": "seaborn",
    "shapely": "shapely",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "sympy": "sympy",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
}
"""The packages that code may import: import name → name for `pip install`."""

TAKE_A_VALUE = {"-r", "--requirement", "-c", "--constraint", "-i", "--index-url", "--extra-index-url", "-t", "--target"}
"""Options of `pip install` that are followed by a value that isn't a package."""


def without(name: str) -> str:
    """The sentence that says that `name` isn't installed, and what is."""
    there = ", ".join(package for package in PACKAGES if util.find_spec(package) is not None)
    return f"this sandbox has no {name}, and no network to install it from; beside the standard library it has {there}"


def main(arguments: list[str] | None = None) -> int:
    """Does what `pip arguments…` would do; returns 0 if all that is asked for is installed."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["help"]
    if command in ("list", "freeze"):
        for package in PACKAGES.values():
            print(f"{package}=={metadata.version(package)}")
        return 0
    missing = [name for name in wanted(rest) if not is_there(name)] if command == "install" else [f"`pip {command}`"]
    if missing:
        print(f"pip: {without(', '.join(missing))}", file=sys.stderr)
    return int(bool(missing))


def wanted(arguments: list[str]) -> list[str]:
    """The names in `arguments`, without versions and extras."""
    names, before = [], ""
    for argument in arguments:
        if not argument.startswith("-") and before not in TAKE_A_VALUE:
            names.append(re.split(r"[\[<>=!~;@ ]", argument, maxsplit=1)[0] or argument)
        before = argument
    return names


def is_there(name: str) -> bool:
    try:
        metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return name in PACKAGES  # as some say `pip install sklearn`
    return True


if __name__ == "__main__":
    sys.exit(main())
