"""Solvers: how a state goes from one index of the grid to the next, as rows of coefficients."""

from drp.sampling.solvers.base import Solver
from drp.sampling.solvers.ddim import DDIM

__all__ = ["DDIM", "Solver"]
