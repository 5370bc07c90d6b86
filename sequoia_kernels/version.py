"""The package's version, for every module that has to name it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
