"""What the weight of an output projection lives in: a file for each kind, and the table of them."""

from fastlock.models.projections.adapted import base_of
from fastlock.models.projections.plain import Bare, Transposed
from fastlock.models.projections.projection import Projection
from fastlock.models.projections.stand_in import REPLACED, StandIn
from fastlock.models.projections.table import adapted_projection, projection_of

__all__ = ["REPLACED", "Bare", "Projection", "StandIn", "Transposed", "adapted_projection", "base_of", "projection_of"]
