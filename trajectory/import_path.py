"""Finds what a user names by an import path, `module:attribute`, with an error that says what is wrong with it.

The module is looked for as by any `import`: in the folder from which the program was started with `python -m`, in
PYTHONPATH, and among the installed packages. Importing it runs it, with the user's own rights.
"""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

_SHAPE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


class ImportPathError(ValueError):
    """An import path that can't be used. The message names it and the remedy."""


def _shaped(path: str) -> str:
    if not _SHAPE.fullmatch(path):
        raise ImportPathError(
            f"{path!r} is no import path: write module:attribute, such as 'my_module:my_function' for a function in "
            "my_module.py"
        )
    return path


ImportPath = Annotated[str, AfterValidator(_shaped)]
"""The type of a setting that is an import path. Only its shape is checked with the setting; nothing is imported."""


def resolve(path: str) -> Any:
    """The object that `path` names.

    Raises ImportPathError if `path` has another shape, there is no such module, the module can't be imported, or it has no
    such attribute.
    """
    name, _, attributes = _shaped(path).partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _broken(path, name, error) from error
        raise ImportPathError(
            f"{path!r}: there is no module {error.name!r} in {Path.cwd()}, in PYTHONPATH or among the installed packages"
        ) from error
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything while it is imported
        raise _broken(path, name, error) from error
    at = name
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            close = difflib.get_close_matches(attribute, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ImportPathError(f"{path!r}: {at} has no {attribute!r}{hint}")
        found, at = getattr(found, attribute), f"{at}.{attribute}"
    return found


def _broken(path: str, module: str, error: BaseException) -> ImportPathError:
    return ImportPathError(f"{path!r}: importing {module} raised {type(error).__name__}: {error}")
