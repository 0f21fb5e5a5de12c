"""The part of IPython that works without a notebook: `IPython.display`."""

from __future__ import annotations


def get_ipython() -> None:
    """None: nothing runs in IPython here."""
