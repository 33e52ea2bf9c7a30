"""Versions of installed packages, for what is written beside results."""

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a clone that is not installed
        return "unknown"
