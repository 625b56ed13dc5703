"""The version of drp."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def find_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("draft-refine")
    except PackageNotFoundError:  # sources on the path that were never installed
        return "0+unknown"
