"""A backend of matplotlib: Agg, with a `plt.show()` that saves the figures into the working directory."""

from __future__ import annotations

import itertools
import os

from matplotlib import _pylab_helpers
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg


class FigureManager(FigureManagerBase):  # type: ignore[misc]
    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """Save the open figures, say under which names, and close them, as a notebook does."""
        names = []
        for manager in _pylab_helpers.Gcf.get_all_fig_managers():
            names.append(next(name for n in itertools.count(1) if not os.path.exists(name := f"figure_{n}.png")))
            manager.canvas.figure.savefig(names[-1])
        _pylab_helpers.Gcf.destroy_all()
        if names:
            print(f"Nothing can be shown in this sandbox; saved instead: {', '.join(names)}")


class FigureCanvas(FigureCanvasAgg):  # type: ignore[misc]
    manager_class = FigureManager
