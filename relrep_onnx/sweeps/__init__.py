"""Sweeps: many runs over one model, their table, and the choice among them.

grid.py    which points                    trial.py   one point: a run of `optimize`, measured
pick.py    the words that choose           engines.py where points run: here, in processes, on a Dask cluster (cluster.py)
book.py    the folder: what is finished    run.py     the order of steps
"""

from relrep_onnx.sweeps.book import written_in
from relrep_onnx.sweeps.grid import Grid, parse_sparsities
from relrep_onnx.sweeps.run import MEASURES, sweep
from relrep_onnx.sweeps.tables import cost_of, front, rows

__all__ = ["MEASURES", "Grid", "cost_of", "front", "parse_sparsities", "rows", "sweep", "written_in"]
