"""The package's C++ module, or an error that says how to get it."""

from __future__ import annotations

try:
    import sequoia_kernels._host as host
except ModuleNotFoundError as error:
    if error.name != "sequoia_kernels._host":
        raise
    from pathlib import Path

    message = (
        f"the C++ module sequoia_kernels._host is not built in {Path(__file__).parent}: run `pip install .` in the "
        "checkout, then leave that folder, whose sources Python finds before the installed package"
    )
    raise ModuleNotFoundError(message, name=error.name) from error

__all__ = ["host"]
