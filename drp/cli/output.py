"""Output files: checks before a run, and writing in the format of the suffix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".npy", ".safetensors")
SOFTWARE = "draft-refine"
"""The metadata by which files written by drp are recognised."""
TRACE_START = b'{"traceEvents":[{"ph":"M","name":"process_name","pid":1,"tid":0,"args":{"name":"leader"}}'


def check_output(path: Path, force: bool) -> None:
    """Raise ValueError if samples cannot be written to `path`, or if it is a file that drp has not written."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"{path} cannot be written: give a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        )
    check_file(path, force)


def check_file(path: Path, force: bool) -> None:
    """Raise ValueError if `path` cannot be written, or if it is a file that drp has not written."""
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")
    if not force and path.exists() and not _is_ours(path):
        raise ValueError(f"{path} already exists, and drp cannot tell if it wrote it; give --force or another name")


def _is_ours(path: Path) -> bool:
    """Return whether drp has written a file, by its content; True for an empty one."""
    if path.stat().st_size == 0:
        return True
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    marks = (f"Software\0{SOFTWARE}".encode(), f'"software":"{SOFTWARE}"'.encode())
    return start.startswith(TRACE_START) or any(mark in start for mark in marks)


def default_output(shape: Sequence[int]) -> Path:
    """Return the default file for samples of this shape: a picture if possible."""
    return Path("samples.png" if is_picture(shape) else "samples.safetensors")


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape is a picture."""
    return len(shape) == 3 and shape[0] in (1, 3)


def check_shape(path: Path, shape: Sequence[int]) -> None:
    """Raise ValueError if samples of this shape cannot be written in the format of `path`."""
    if path.suffix.lower() == ".png" and not is_picture(shape):
        raise ValueError(
            f"{path} cannot hold samples of shape {list(shape)}: a picture has 1 or 3 channels; "
            "write them to a file that ends in .npy or .safetensors"
        )


def write_samples(samples: Tensor, columns: int, path: Path, scale: int = 2) -> None:
    """Write samples [B, ...] as a PNG with `columns` per row, or as one array, named `samples` in .safetensors."""
    ending = path.suffix.lower()
    if ending == ".png":
        from drp.pictures import save_grid

        save_grid(samples, columns, path, scale)
    elif ending == ".npy":
        import numpy as np

        np.save(path, samples.numpy(force=True))
    else:
        from safetensors.torch import save_file

        save_file({"samples": samples.cpu().contiguous()}, path, {"software": SOFTWARE})
