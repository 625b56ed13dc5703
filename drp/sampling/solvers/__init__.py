"""Solvers: the step from one index of the grid to the next, as a linear combination."""

from drp.sampling.solvers.base import Solver
from drp.sampling.solvers.ddim import DDIM, DDPM, EulerAncestral
from drp.sampling.solvers.dpm import DPMSolver
from drp.sampling.solvers.multistep import DEIS, IPNDM, PNDM, Heun, LinearMultistep
from drp.sampling.solvers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "PNDM",
    "DPMSolver",
    "EulerAncestral",
    "Heun",
    "LinearMultistep",
    "Solver",
    "UniPC",
]
