"""Diffusers pipelines by name: a folder, a name on the hub, or `package.module:factory`."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
"""The file of a pipeline's folder that names its components."""
KINDS = "a pipeline's folder, a hub's name such as org/name, or package.module:factory"


def load_pipeline(name: str, others: Sequence[str] = ()) -> Any:
    """Load the pipeline of this name.

    A folder and a factory are checked before diffusers is imported. A name of the form org/name that is no folder is
    loaded from the hub, or from its local cache.

    Args:
        name: a pipeline's folder, a hub's name, or `package.module:factory`.
        others: names that the caller knows besides, for the error message.

    Raises ValueError, which says what is missing, if there is no such pipeline.
    """
    if ":" in name:
        made = find_factory(name)()
        if not is_pipeline(made):
            raise ValueError(f"{name!r} returned a {type(made).__name__}, which is not a diffusers pipeline")
        return made
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise ValueError(f"{name!r} is a folder without {INDEX}, so it holds no pipeline")
    elif not _may_be_of_hub(name):
        known = "".join(f"{other}, " for other in others)
        raise ValueError(f"{name!r} is neither a folder nor a name on the hub; give {known}{KINDS}")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'draft-refine[diffusers]'") from None
    try:
        return DiffusionPipeline.from_pretrained(str(folder) if folder.is_dir() else name)
    except (OSError, ValueError) as error:
        where = "" if folder.is_dir() else ", which is not a local folder, from the hub or its cache"
        raise ValueError(f"cannot load the pipeline {name!r}{where}: {error}") from error


def is_pipeline(made: object) -> bool:
    """Return whether a factory has returned a diffusers pipeline, and not a model."""
    return hasattr(made, "components") and hasattr(made, "scheduler")


def find_factory(name: str) -> Callable[[], Any]:
    """Return the factory that `package.module:factory` names; raise ValueError if it cannot be imported."""
    check_module(name)
    try:
        factory: Callable[[], Any] = pkgutil.resolve_name(name)
    except AttributeError as error:
        raise ValueError(f"{name!r}: {error}; write package.module:factory") from None
    except ImportError as error:
        raise ValueError(f"{name!r}: module {name.partition(':')[0]!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise ValueError(f"{name!r} is a {type(factory).__name__}; a factory is a function without arguments")
    return factory


def check_module(name: str) -> None:
    """Raise ValueError if `name` is `package.module:factory` and there is no such module, without importing it."""
    module, colon, _ = name.partition(":")
    try:
        found = not colon or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise ValueError(
            f"{name!r}: there is no module {module!r} in the working directory or on Python's path; give its folder "
            "with --app-dir"
        )


def _may_be_of_hub(name: str) -> bool:
    """Return whether a name has the form org/name of a hub's repository, and not that of a path."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and part.strip(".~") == part for part in parts)
