"""Which Penstock this is."""

from importlib.metadata import PackageNotFoundError, version


def penstock_version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
