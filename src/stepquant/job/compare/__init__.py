"""Many recipes on one model, measured alike: a grid of cells in a run store, and the page about them.

cells = grid("stepquant:characters", methods=["minmax"], schemes=["w8a8", "w4a8"], seeds=3)
outcome = compare(cells, Path("runs/compare"))
"""

from stepquant.job.compare.cell import Cell, Evaluation
from stepquant.job.compare.executor import Executor, Inline
from stepquant.job.compare.grid import Variant, grid
from stepquant.job.compare.processes import Processes
from stepquant.job.compare.start import Compared, compare, known

__all__ = [
    "Cell",
    "Compared",
    "Evaluation",
    "Executor",
    "Inline",
    "Processes",
    "Variant",
    "compare",
    "grid",
    "known",
]
