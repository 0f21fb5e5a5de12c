"""Stands in the place of tqdm's bar of widgets, which needs a notebook: the same names for the bar of text."""

from __future__ import annotations

from tqdm.std import tqdm as tqdm
from tqdm.std import trange as trange

tqdm_notebook, tnrange = tqdm, trange
