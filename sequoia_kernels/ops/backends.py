"""Backends of the ops: who can run a call, and who does.

How a room takes part (``sequoia_kernels/ops/<op>/``):

1. ``op.py`` declares the op, its inputs and its outputs; see ``operators.py``.

2. A backend is a file in the room, and its name follows from the file: ``reference.py`` -> "reference", ``host.py`` ->
   "host", ``sdpa.py`` -> "sdpa", ``triton_launch.py`` -> "triton" (its kernels are in ``triton_kernels.py``),
   ``cuda.py`` -> "cuda". Adding the file adds the backend; nothing else changes. The file is imported at the first call
   that could use it, never at package import, so it imports what it needs at its top: ``import triton`` or
   ``import sequoia_kernels._host as _host``. If that import fails, the backend is unavailable and the failure is its
   reason; a failing import of anything that is not optional is a bug and is raised.

3. A backend file exposes

   - ``supports(inputs) -> str | None``: None if it can run this call, else the reason why not. It reads dtypes,
     shapes, layouts and devices, never values (no host sync), and takes a microsecond or two. Of the state of the
     process it may read torch's number of CPU threads, and what stays as it is. A reason states the rule
     and not the sizes that were passed, since every new reason is logged: "takes head dims that are multiples of 8".
   - ``run(inputs, outputs) -> None``: writes every output that is not None, of whatever strides. ``outputs`` is None
     for ops that write to their inputs. ``run`` may rely on the checks in ``op.py``.
   - optionally ``unavailable() -> str | None``: why it cannot run on this machine ("no CUDA device"), asked once.
   - optionally ``declines(inputs) -> str | None``: why "auto" should rather take a backend behind this one, although
     this one supports the call: the other is faster there. Rules as for ``supports``; a backend asked for by name is
     not asked.
   - optionally ``CHECKS_VALUES = True``: its ``run`` itself refuses bad values (NaN logits, ...) before it writes
     anything, with the same messages, so that nobody else need read the data for that.

The choice: ``backend="auto"`` takes the first of ``AUTO_ORDER[device type]`` that is in the room, available and
supports the call, and logs the choice once for each (op, device, reasons of those passed over) at INFO on
"sequoia_kernels". A backend asked for by name runs or raises ``BackendUnavailableError`` with its reason: there is no
silent fallback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sequoia_kernels.errors import BackendUnavailableError

__all__ = [
    "AUTO_ORDER",
    "Backend",
    "backend_names",
    "backend_report",
    "choose",
    "register_backend",
    "register_room",
    "runs_own",
    "unavailable_reason",
]

AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("host", "sdpa", "reference"),
    "cuda": ("cuda", "triton", "sdpa", "reference"),
}
_OTHER_DEVICES = ("sdpa", "reference")

# Backend name -> the file of a room that holds it.
_MODULES = {"reference": "reference", "host": "host", "sdpa": "sdpa", "triton": "triton_launch", "cuda": "cuda"}

# Packages and modules that an installation may lack; a failing import of one makes a backend unavailable.
_OPTIONAL_MODULES = {
    "triton": "triton is not installed",
    "sequoia_kernels._host": "the C++ module sequoia_kernels._host is not built",
    "sequoia_kernels._cuda": "the CUDA module sequoia_kernels._cuda is not built",
}

_logger = logging.getLogger("sequoia_kernels")


class Backend:
    """One way to run one op."""

    __slots__ = ("checks_values", "declines", "name", "op", "run", "supports")

    def __init__(
        self,
        op: str,
        name: str,
        supports: Callable[..., str | None],
        run: Callable[..., Any],
        checks_values: bool = False,
        declines: Callable[..., str | None] | None = None,
    ) -> None:
        self.op = op
        self.name = name
        self.supports = supports
        self.run = run
        self.checks_values = checks_values
        self.declines = declines

    def __repr__(self) -> str:
        return f"Backend({self.op}, {self.name})"


# op -> backend name -> the module to import, the loaded backend, or the reason why there is none.
_modules: dict[str, dict[str, str]] = {}
_loaded: dict[str, dict[str, Backend]] = {}
_reasons: dict[str, dict[str, str]] = {}
_auto: dict[tuple[str, str], tuple[Backend, ...]] = {}
_logged: set[tuple[str, str, str, tuple[str, ...]]] = set()


def register_room(op: str, package: str) -> None:
    """Register the backends whose files lie in an op's package, without importing them.

    Args:
        op: name of the op.
        package: dotted name of the room, ``__package__`` in its ``op.py``.
    """
    _modules[op] = {
        name: f"{package}.{module}"
        for name, module in _MODULES.items()
        if importlib.util.find_spec(f"{package}.{module}") is not None
    }
    _loaded[op] = {}
    _reasons[op] = {}
    _forget_choices(op)


def register_backend(
    op: str,
    name: str,
    supports: Callable[..., str | None],
    run: Callable[..., Any],
    *,
    unavailable: Callable[[], str | None] | None = None,
    checks_values: bool = False,
) -> None:
    """Register one backend by hand, for instance from a package outside this one. It replaces one of the same name.

    Args:
        op: name of the op.
        name: name of the backend. ``auto`` considers it only if ``AUTO_ORDER`` lists it.
        supports: as in the module docstring.
        run: as in the module docstring.
        unavailable: as in the module docstring; None means always available.
        checks_values: as ``CHECKS_VALUES`` in the module docstring.
    """
    _modules.setdefault(op, {})[name] = ""
    _loaded.setdefault(op, {}).pop(name, None)
    _reasons.setdefault(op, {}).pop(name, None)
    reason = unavailable() if unavailable is not None else None
    if reason is None:
        _loaded[op][name] = Backend(op, name, supports, run, checks_values)
    else:
        _reasons[op][name] = reason
    _forget_choices(op)


def _forget_choices(op: str) -> None:
    for key in [key for key in _auto if key[0] == op]:
        del _auto[key]


def _missing_module_reason(error: ImportError) -> str | None:
    """The reason if an optional module is what could not be imported, else None."""
    for module, reason in _OPTIONAL_MODULES.items():
        parent, _, leaf = module.rpartition(".")
        if error.name == parent and f"cannot import name '{leaf}'" in str(error):  # from parent import leaf
            return reason
        if error.name == module or (error.name or "").startswith(module + "."):
            # A module that exists and fails to load (a missing shared library, say) has more to tell than its name.
            return reason if isinstance(error, ModuleNotFoundError) else f"{module} cannot be loaded: {error}"
    return None


def _load(op: str, name: str) -> Backend | str:
    """The backend, or the reason why it is unavailable. Both are remembered."""
    backend = _loaded[op].get(name)
    if backend is not None:
        return backend
    if name in _reasons[op]:
        return _reasons[op][name]
    try:
        module = importlib.import_module(_modules[op][name])
    except ImportError as error:
        reason = _missing_module_reason(error)
        if reason is None:
            raise
    else:
        reason = module.unavailable() if hasattr(module, "unavailable") else None
        if reason is None:
            backend = Backend(
                op,
                name,
                module.supports,
                module.run,
                getattr(module, "CHECKS_VALUES", False),
                getattr(module, "declines", None),
            )
            _loaded[op][name] = backend
            return backend
    _reasons[op][name] = reason
    return reason


def backend_names(op: str) -> tuple[str, ...]:
    """Names of the backends that an op has, available or not."""
    return tuple(_modules[op])


def unavailable_reason(op: str, name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None if it can."""
    backend = _load(op, name)
    return backend if isinstance(backend, str) else None


def backend_report() -> dict[str, dict[str, str | None]]:
    """Tell for each op and backend why it cannot run on this machine.

    Returns:
        op -> backend name -> None if available, else the reason.

    Example:
        >>> import sequoia_kernels.ops
        >>> backend_report()["tree_attention"]["reference"] is None
        True
    """
    return {op: {name: unavailable_reason(op, name) for name in names} for op, names in sorted(_modules.items())}


def runs_own(op: str, requested: str, device_type: str, name: str) -> bool:
    """Tell whether calls that a backend of this package supports are run by it, for who goes past the op.

    Args:
        op: name of the op.
        requested: a backend name, or "auto".
        device_type: where the tensors are.
        name: the backend.

    Returns:
        False too where somebody has registered another one in its place.
    """
    if requested == "auto":
        if (op, device_type) not in _auto:
            _auto[op, device_type] = _available(op, device_type)
        first = next(iter(_auto[op, device_type]), None)
    else:
        first = _loaded[op].get(requested) if requested in _modules[op] and _load(op, requested) else None
    if first is None or first.name != name or not _modules[op][name]:
        return False
    if requested == "auto" and (key := (op, device_type, name, ())) not in _logged:
        _log_choice(key)
    return True


def choose(op: str, requested: str, device_type: str, inputs: Sequence[Any]) -> Backend:
    """Find the backend that shall run a call.

    Args:
        op: name of the op.
        requested: a backend name, or "auto".
        device_type: where the tensors are, for instance "cpu".
        inputs: what the backend's ``supports`` and ``run`` take.

    Returns:
        A backend that supports the call.

    Raises:
        BackendUnavailableError: the backend asked for is unavailable or does not support the call.
        ValueError: the op has no backend of that name.
    """
    if requested != "auto":
        return _named(op, requested, inputs)
    candidates = _auto.get((op, device_type))
    if candidates is None:
        candidates = _auto[op, device_type] = _available(op, device_type)
    passed_over: tuple[str, ...] = ()
    for backend in candidates:
        reason = backend.supports(inputs)
        if reason is None and backend.declines is not None:
            reason = backend.declines(inputs)
        if reason is None:
            key = (op, device_type, backend.name, passed_over)
            if key not in _logged:
                _log_choice(key)
            return backend
        passed_over += (f"{backend.name}: {reason}",)
    raise BackendUnavailableError(f"{op}: no backend on {device_type} supports this call ({'; '.join(passed_over)})")


def _available(op: str, device_type: str) -> tuple[Backend, ...]:
    names = [name for name in AUTO_ORDER.get(device_type, _OTHER_DEVICES) if name in _modules[op]]
    return tuple(backend for backend in (_load(op, name) for name in names) if isinstance(backend, Backend))


def _named(op: str, name: str, inputs: Sequence[Any]) -> Backend:
    if name not in _modules[op]:
        raise ValueError(f"{op}: backend must be one of {', '.join(['auto', *backend_names(op)])}, got {name!r}")
    backend = _load(op, name)
    reason = backend if isinstance(backend, str) else backend.supports(inputs)
    if isinstance(backend, Backend) and reason is None:
        return backend
    raise BackendUnavailableError(f"{op}: backend {name!r} cannot run this call: {reason}")


def _log_choice(key: tuple[str, str, str, tuple[str, ...]]) -> None:
    op, device_type, name, passed_over = key
    _logged.add(key)
    order = AUTO_ORDER.get(device_type, _OTHER_DEVICES)
    absent = tuple(
        f"{other}: {_reasons[op][other]}" for other in order[: order.index(name)] if other in _reasons.get(op, {})
    )
    reasons = "; ".join(absent + passed_over)
    _logger.info("%s on %s runs on backend %s%s", op, device_type, name, f" ({reasons})" if reasons else "")
