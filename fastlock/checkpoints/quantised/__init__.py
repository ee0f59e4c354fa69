"""Output projections whose weights are quantised: a file for each format, and the table of them."""

from fastlock.checkpoints.quantised.columns import DequantisedColumns
from fastlock.checkpoints.quantised.site_tensors import Quantised, Settings, SiteTensors
from fastlock.checkpoints.quantised.table import WEIGHTS, format_at, is_projection, is_quantised, quantised_at

__all__ = [
    "WEIGHTS",
    "DequantisedColumns",
    "Quantised",
    "Settings",
    "SiteTensors",
    "format_at",
    "is_projection",
    "is_quantised",
    "quantised_at",
]
