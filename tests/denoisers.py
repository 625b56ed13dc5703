"""Denoisers for the tests: small, quick, and some that misbehave. Workers import them by name."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import time
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from drp import ModelSpec
from drp.errors import ProtocolError
from drp.protocol.messages import VERSION, Hello
from drp.protocol.transport import WorkerSocket

Cond = Mapping[str, Tensor]


class Tiny(nn.Module):
    """Two convolutions with seeded weights: enough that rounding would show."""

    spec = ModelSpec(sample_shape=(1, 8, 8), classes=10)

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.3))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.2

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        h = torch.tanh(self.first(x) + (t / 1000 + cond["labels"] / 10)[:, None, None, None])
        out: Tensor = self.last(h) + self.scale * x
        return out


def free(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Any shape. There may be a condition that is added, one that says how long it takes, and one that it waits for.

    `gate` is a process and its descriptor of a pipe, whose other end is closed to end the wait at timesteps below 700.
    """
    if "gate" in cond and _at(700, t):
        Path("/proc/{}/fd/{}".format(*cond["gate"].tolist())).read_bytes()
    if "seconds" in cond:
        time.sleep(float(cond["seconds"]))
    shift = cond["shift"] if "shift" in cond else torch.zeros(())
    return torch.sin(x) * (1 - t / 2000).view(-1, *[1] * (x.dim() - 1)) + shift


def make_free() -> Callable[..., Tensor]:
    return free


def _at(timestep: float, t: Tensor) -> bool:
    return bool(t[0] < timestep)


def make_raising() -> Callable[..., Tensor]:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if _at(500, t):
            raise ArithmeticError("the denoiser has had enough")
        return x

    return predict


def make_crashing() -> Callable[..., Tensor]:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if _at(500, t):
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as a fault of its own would be
        return x

    return predict


def make_hanging() -> Callable[..., Tensor]:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if _at(500, t):
            time.sleep(600)
        return x

    return predict


def make_slow() -> Callable[..., Tensor]:
    if "FAREWELL" in os.environ:
        atexit.register(Path(os.environ["FAREWELL"], str(os.getpid())).touch)

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time.sleep(0.05)
        return x

    return predict


def make_slow_sine() -> Callable[..., Tensor]:
    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        time.sleep(0.02)
        return free(x, t, cond)

    return predict


def make_chatty() -> Callable[..., Tensor]:
    """The first worker introduces itself again in the middle of a run."""
    first = multiprocessing.current_process().name == "worker-0-0"

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if first and _at(500, t):
            socket = next(each for each in gc.get_objects() if type(each) is WorkerSocket)
            socket.send(Hello(VERSION, os.getpid()))
        return free(x, t, cond)

    return predict


def make_misshapen() -> Callable[..., Tensor]:
    return lambda x, t, cond: x[:, :, 1:]


def make_infinite() -> Callable[..., Tensor]:
    return lambda x, t, cond: x / 0


def make_nan() -> Callable[..., Tensor]:
    return lambda x, t, cond: torch.full_like(x, torch.nan) if _at(500, t) else x


class WordlessError(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


RAISED = (
    ValueError("cannot read \udcff.bin"),
    WordlessError(),
    SystemExit("bye"),
    KeyboardInterrupt(),
    CancelledError(),
    ProtocolError("the denoiser's own"),
    ValueError("x" * 5_000_000),
)
"""Errors that are hard to tell, or that would end more than they should."""


def make_failing_oddly() -> Callable[..., Tensor]:
    """Raise what the condition `raised` says, a place in RAISED."""

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if _at(500, t):
            raise RAISED[int(cond["raised"])]
        return x

    return predict


ILLS = (
    make_raising,
    make_misshapen,
    make_infinite,
    make_nan,
    make_crashing,
    make_failing_oddly,
)


def make_ailing() -> Callable[..., Tensor]:
    """What the condition `ill` says, a place in ILLS; without it the free one. So one start of workers does for all."""
    ills = [make() for make in ILLS]

    def predict(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return ills[int(cond["ill"])](x, t, cond) if "ill" in cond else free(x, t, cond)

    return predict


def ill(name: str) -> dict[str, Tensor]:
    """Return the condition that has make_ailing do as another factory's denoiser."""
    return {"ill": torch.tensor([make.__name__ for make in ILLS].index(name))}


def make_varying() -> nn.Module:
    """Other weights in every process, since no seed is set."""
    torch.seed()
    return Linear(4)


class Linear(nn.Module):
    spec = ModelSpec(sample_shape=(4,))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def make_other_shapes() -> nn.Module:
    """Other shapes in every process."""
    return Linear(1 + os.getpid() % 997)


def make_shifted() -> nn.Module:
    """Weights that depend on the machine, for which the environment stands."""
    model = Tiny()
    model.scale += float(os.environ.get("DRP_TEST_SHIFT", "0"))
    return model


def fail_to_load() -> nn.Module:
    raise FileNotFoundError("weights of the test are not there")


def exhaust_memory() -> nn.Module:
    torch.empty(2**55, dtype=torch.uint8)
    raise AssertionError("a machine with 32 PiB of memory")


def die_while_loading() -> nn.Module:
    os._exit(7)


def hang_while_loading() -> nn.Module:
    time.sleep(600)
    raise AssertionError("not reached")


not_callable = None


def return_nothing() -> None:
    return None


def make_unseeded() -> torch.nn.Module:
    """A network whose weights are drawn without a seed, for x of any shape that ends in 4."""

    class Unseeded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return torch.tanh(self.layer(x))

    return Unseeded()
