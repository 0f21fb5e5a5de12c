"""Replaces tqdm's bar for notebooks by the bar of text, under the same names."""

from __future__ import annotations

from tqdm.std import tqdm as tqdm
from tqdm.std import trange as trange

tqdm_notebook, tnrange = tqdm, trange
