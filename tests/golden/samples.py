"""Golden samples: what every mode, rule and solver drew when samples.safetensors was written.

A change that means to leave samples alone must leave these alone. `python -m tests.golden.samples` writes the file
anew, after a change that means to alter samples; the commit then says why.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import drp

FILE = Path(__file__).with_name("samples.safetensors")
STEPS = 12
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"mode": "sequential"},
    "aggressive-2": {"mode": "aggressive", "drafts": 2},
    "aggressive-4": {"mode": "aggressive", "drafts": 4},
    "conservative-3": {"mode": "conservative", "drafts": 3},
    "adaptive-4": {"mode": "adaptive", "drafts": 4, "tolerance": 0.02},
    "rolling-3": {"mode": "rolling", "drafts": 3},
    "warmup-2": {"mode": "aggressive", "drafts": 4, "warmup": 2},
    "sweeps-1": {"mode": "aggressive", "drafts": 4, "sweeps": 1},
}
RULES = ("paper", "secant")
SOLVERS: dict[str, dict[str, Any]] = {
    "ddim": {"solver": "ddim"},
    "ddpm": {"solver": "ddpm"},
    "euler": {"solver": "euler"},
    "euler-ancestral": {"solver": "euler-ancestral"},
    "dpmsolver++": {"solver": "dpmsolver++"},
    "dpmsolver++-3": {"solver": "dpmsolver++", "solver_options": {"order": 3}, "grid": {"sigmas": "karras"}},
    "sde-dpmsolver++": {"solver": "sde-dpmsolver++"},
    "dpmsolver": {"solver": "dpmsolver"},
    "deis": {"solver": "deis"},
    "unipc": {"solver": "unipc"},
    "lms": {"solver": "lms"},
    "heun": {"solver": "heun"},
    "pndm": {"solver": "pndm"},
    "ipndm": {"solver": "ipndm", "prediction_type": "v"},
    "flow": {"solver": "euler", "prediction_type": "flow", "grid": {"shift": 3.0}},
}


def make_rational() -> Callable[..., Tensor]:
    """A denoiser of sums, products and quotients alone, which every processor rounds alike."""

    def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        pull = (0.2 + t / 1250).view(-1, *[1] * (x.dim() - 1))
        return pull * x / (1 + x * x / 4) + 0.05

    return predict


def cases() -> dict[str, dict[str, Any]]:
    """Return the arguments of `drp.reference` for each golden sample, by name."""
    found: dict[str, dict[str, Any]] = {}
    rational = {"model": make_rational, "shape": (3, 2), "count": 2, "seed": 7, "steps": STEPS}
    digits = {"model": "digits", "labels": [3], "seed": 1, "steps": 8}
    for name, mode in MODES.items():
        for rule in RULES:
            found[f"rational/{name}/{rule}/ddim"] = {**rational, **mode, "rule": rule, "solver": "ddim"}
    for name, solver in SOLVERS.items():
        for kind in ("sequential", "aggressive-4", "conservative-3"):
            found[f"rational/{kind}/secant/{name}"] = {**rational, **MODES[kind], "rule": "secant", **solver}
    for name in ("aggressive-4", "adaptive-4"):
        for rule in RULES:
            found[f"digits/{name}/{rule}/ddim"] = {**digits, **MODES[name], "rule": rule, "solver": "ddim"}
    found["digits/batched/secant/ddim"] = {
        **digits,
        **MODES["aggressive-4"],
        "rule": "secant",
        "solver": "ddim",
        "devices": 2,
        "drafts_per_device": 2,
    }
    return found


def draw(case: dict[str, Any]) -> Tensor:
    """Return the samples of a case."""
    return drp.reference(**case).samples


def machine() -> str:
    """Say what has a part in the last bits: the processor, and torch with the libraries that it was built with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()}, {model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def load() -> tuple[dict[str, Tensor], str]:
    """Return the stored samples by name, and the machine that drew them."""
    with safe_open(FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["machine"]  # noqa: SIM118  # no mapping


if __name__ == "__main__":
    save_file({name: draw(case) for name, case in cases().items()}, FILE, {"machine": machine()})
