"""Pure tensor mathematics: grids, rounding, ranges, packing, losses."""
