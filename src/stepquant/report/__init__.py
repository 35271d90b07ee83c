"""Results as people read them. Input is the plain JSON that `stepquant.schema` describes; missing parts are left out.

write(results, folder) -> Path                      report.html (self-contained), report.md, results.json
table(results) -> list[tuple[str, ...]]             the headline rows, first row the header
markdown(results) -> str                            the same as a markdown table
card(results) -> str                                README.md of a saved artifact
grid(images, columns=None, scale=None) -> PIL image images (n, 3, h, w) in [0, 1] side by side, tiny ones enlarged
"""

from stepquant.report.card import card
from stepquant.report.compare import compare
from stepquant.report.images import grid, write_grid
from stepquant.report.page import render, write
from stepquant.report.tables import markdown, table
from stepquant.schema import Report

__all__ = ["Report", "card", "compare", "grid", "markdown", "render", "table", "write", "write_grid"]
