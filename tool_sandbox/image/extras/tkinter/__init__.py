"""Stands in for tkinter, as there is no display here. It can be imported; what would open a window raises the error that the
real one raises without a display."""

from __future__ import annotations

import sys
from types import ModuleType

TclVersion = TkVersion = 8.6


class TclError(Exception):
    """What tkinter raises."""


class Misc:
    """The base of all classes here: none can be made."""

    def __init__(self, *arguments: object, **options: object) -> None:
        raise TclError("no display name and no $DISPLAY environment variable: this sandbox has no display")


# fmt: off
_WIDGETS = (
    "Button", "Canvas", "Checkbutton", "Entry", "Event", "Frame", "Label", "LabelFrame", "Listbox", "Menu",
    "Menubutton", "Message", "OptionMenu", "PhotoImage", "Radiobutton", "Scale", "Scrollbar", "Spinbox", "Text", "Tk",
    "Toplevel", "BooleanVar", "DoubleVar", "IntVar", "StringVar", "Variable", "mainloop",
)
_CONSTANTS = (
    "ACTIVE", "ALL", "BOTH", "BOTTOM", "CENTER", "DISABLED", "E", "END", "HORIZONTAL", "INSERT", "LEFT", "N", "NORMAL",
    "NSEW", "NW", "RIGHT", "S", "SUNKEN", "TOP", "VERTICAL", "W", "WORD", "X", "Y",
)
# fmt: on


def __getattr__(name: str) -> object:
    """A class for each other name that tkinter or one of its modules may have."""
    if name.startswith("__"):
        raise AttributeError(f"module 'tkinter' has no attribute {name!r}")
    return globals().setdefault(name, type(name, (Misc,), {"__module__": __name__}))


for _name in _WIDGETS:
    __getattr__(_name)
for _name in _CONSTANTS:
    globals()[_name] = _name.lower()
__all__ = [*_WIDGETS, *_CONSTANTS, "Misc", "TclError", "TclVersion", "TkVersion"]

for _name in ("ttk", "messagebox", "filedialog", "simpledialog", "scrolledtext", "colorchooser", "font"):
    _module = ModuleType(f"{__name__}.{_name}")
    _module.__getattr__ = __getattr__  # type: ignore[method-assign]
    sys.modules[_module.__name__] = globals()[_name] = _module
