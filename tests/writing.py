"""A denoiser that writes wherever it can, and the same one written without that."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

KINDS = (
    "input",
    "condition",
    "timestep",
    "mapping",
    "workspace",
    "counter",
    "replaced buffer",
    "result in a buffer",
    "parameter",
    "view",
    "not contiguous",
    "half",
    "double",
    "gradient",
)


def cond(kind: str, pure: bool = False) -> dict[str, Tensor]:
    """Return conditions that ask for a way of writing, or for the same prediction without it."""
    return {"e": torch.tensor([1.5, 0.5]), "kind": torch.tensor(KINDS.index(kind)), "pure": torch.tensor(pure)}


class Writing(nn.Module):
    """x is [B, 2, 3], the condition e [2]."""

    work: Tensor
    count: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("work", torch.zeros(1024), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        kind, e = KINDS[int(cond["kind"])], cond["e"].view(2, 1)
        at = t.view(-1, 1, 1) / 1000
        predicted = torch.tanh(x) * at + 0.1 * e
        if cond["pure"]:
            return self._pure(kind, x, at, e, predicted)
        match kind:
            case "input":
                x.mul_(0.5)
                time.sleep(0.001)  # Another worker that had the same memory would write to it by now.
                return torch.tanh(x) * at + 0.1 * e
            case "condition":
                e.mul_(0.9)
                time.sleep(0.001)
                return torch.tanh(x) * at + 0.1 * e
            case "timestep":
                t.mul_(0.5)
                return torch.tanh(x) * (t.view(-1, 1, 1) / 1000) + 0.1 * e
            case "mapping":
                return torch.tanh(x) * at + 0.1 * cond.pop("e").view(2, 1)
            case "workspace":
                self.work[: x.numel()].copy_(x.reshape(-1))
                time.sleep(0.001)
                return torch.tanh(self.work[: x.numel()].view_as(x)) * at + 0.1 * e
            case "counter":
                self.count.add_(1)
                return predicted * self.count
            case "replaced buffer":
                self.scale = self.scale * 2
                return predicted * self.scale
            case "result in a buffer":
                out = self.work[: x.numel()].view_as(x)
                return out.copy_(predicted)
            case "parameter":
                self.weight.copy_(e.view(2) * x.mean())
                time.sleep(0.001)
                return predicted + self.weight.view(2, 1)
            case "view":
                return x
            case "not contiguous":
                return predicted.transpose(1, 2).contiguous().transpose(1, 2)
            case "half":
                return predicted.half()
            case "double":
                return predicted.double()
            case _:
                with torch.enable_grad():
                    y = x.detach().requires_grad_(True)
                    (gradient,) = torch.autograd.grad((y * y).sum(), y)
                return predicted + 0.1 * gradient

    def _pure(self, kind: str, x: Tensor, at: Tensor, e: Tensor, predicted: Tensor) -> Tensor:
        match kind:
            case "input":
                return torch.tanh(x * 0.5) * at + 0.1 * e
            case "condition":
                return torch.tanh(x) * at + 0.1 * (e * 0.9)
            case "timestep":
                return torch.tanh(x) * (at * 0.5) + 0.1 * e
            case "replaced buffer":
                return predicted * 2
            case "parameter":
                return predicted + (e.view(2) * x.mean()).view(2, 1)
            case "view":
                return x.clone()
            case "half":
                return predicted.half().float()
            case "gradient":
                return predicted + 0.1 * (2 * x)
            case _:
                return predicted


made = Writing()


def make_once() -> Writing:
    """The same module in each call of a process."""
    return made


class ExchangingLayer(nn.Module):
    """A layer around one of a pipeline's own, which replaces a buffer by an equal one."""

    scale: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", torch.full((1,), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.scale = torch.ones(1) * 1.5  # as OmniGen's rotary embedding does
        out: Tensor = self.inner(x * self.scale)
        return out
