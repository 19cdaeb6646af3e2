"""qsens: which layers of a model break in low precision, in which format, and how sure that is."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("qsens")
except PackageNotFoundError:  # a source tree on the path, never installed
    __version__ = "0+unknown"
