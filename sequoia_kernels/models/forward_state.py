"""What a forward depends on apart from the numbers in the weights: what a plan or a captured graph holds on to.

Nothing in here knows adapter libraries or quantisers by name. A module computes by its class, by functions put into its
place, by hooks, and by what its plain attributes say, such as which adapters are active and how they are scaled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sequoia_kernels.models.switch import ATTENTION_FIELD, AttentionSwitch, each_module

__all__ = [
    "Same",
    "described_once",
    "foreign_code_ran",
    "forget_what_forwards_write",
    "forward_state",
    "known_state",
    "num_foreign",
]  # fmt: skip

# Attributes of every module: its children and weights, which are looked at by themselves, and hooks that do not belong
# to a forward.
_BOOKKEEPING = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_WEIGHTS = ("_parameters", "_buffers")
_PLAIN_WEIGHTS = (nn.Parameter, torch.Tensor)
_SCALARS = frozenset((bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None)))
_CONTAINERS = (dict, list, tuple, set, frozenset)
_NO_ATTENTION = ""
# By module, attributes that say nothing about its next forward.
_written: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()
_NOTHING: frozenset[str] = frozenset()

_num_foreign = 0  # times that code of others is known to have run
_call = threading.local()  # `states` by model while there is a `described_once`


def foreign_code_ran() -> None:
    """Say that code of others has run in the middle of decoding: whatever it may have done to models is seen next."""
    global _num_foreign
    _num_foreign += 1


def num_foreign() -> int:
    """How often `foreign_code_ran` was called."""
    return _num_foreign


@contextmanager
def described_once() -> Iterator[None]:
    """Let this thread describe each model once in the body, which runs none of others' code without saying so."""
    before = getattr(_call, "states", None)
    _call.states = {}
    try:
        yield
    finally:
        _call.states = before


def known_state(model: PreTrainedModel) -> tuple[Any, ...]:
    """As `forward_state`, or what that said before in the same `described_once` if no foreign code has run since."""
    states = getattr(_call, "states", None)
    if states is None:
        return forward_state(model)
    when, state = states.get(model, (-1, ()))
    if when != _num_foreign:
        state = forward_state(model)
        states[model] = _num_foreign, state
    return state


def forward_state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Describe what a forward of a model depends on besides its inputs and the numbers in its weights.

    A hashable value that is equal as long as nothing has changed: configurations, attention functions, which modules
    it has, with their forwards, hooks and attributes, shapes, layouts, dtypes and devices of weights, autocast. Keeps
    nothing of the model alive. Waits for forwards of the model that other threads run through tree models.
    """
    return AttentionSwitch(model, _NO_ATTENTION).at_rest(lambda: _describe(model))


def forget_what_forwards_write(model: PreTrainedModel, forward: Callable[[], Any]) -> None:
    """Leave numbers and tensors that every forward writes out of a model's state: counters, what was computed last.

    `forward` runs the model once more; what its first forward sets up stays in the state.
    """
    before = {module: dict(module.__dict__) for module in each_module(model)}
    forward()
    for module, values in before.items():
        for name, value in module.__dict__.items():
            plain = type(value) in _SCALARS or isinstance(value, torch.Tensor)
            if name not in _BOOKKEEPING and plain and name in values and values[name] is not value:
                _written.setdefault(module, set()).add(name)


class Same:
    """Stands for an object: equal as long as that lives, and to nothing that comes to lie at its address later."""

    __slots__ = ("_hash", "_reference")

    def __init__(self, value: Any) -> None:
        self._reference, self._hash = weakref.ref(value), id(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return value is not None and isinstance(other, Same) and other._reference() is value


def _describe(model: PreTrainedModel) -> tuple[Any, ...]:
    seen: dict[int, Any] = {}
    configs: list[Any] = []
    classes: dict[type, Any] = {}
    parts: list[Any] = []
    for module in each_module(model):
        _describe_module(module, parts, seen, configs, classes)
    for config in configs:  # grows while configurations inside of configurations are met
        parts.append(_value(vars(config), seen, configs))
    names = {vars(config).get(ATTENTION_FIELD) for config in configs}
    return (
        *parts,
        *classes.items(),
        *(_value(ALL_ATTENTION_FUNCTIONS.get(name), seen, configs) for name in sorted(names, key=str)),
        *(tuple(getattr(nn.modules.module, f"_global{name}")) for name in _HOOKS),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")),
    )


def _describe_module(
    module: nn.Module, parts: list[Any], seen: dict[int, Any], configs: list[Any], classes: dict[type, Any]
) -> None:
    kind = type(module)
    if kind not in classes:
        classes[kind] = _value(getattr(kind, "forward", None), seen, configs)  # scripted ones have none
    parts.append(kind)
    parts.append(weakref.ref(module))  # another one of the same form has other weights; and in this order they run
    written = _written.get(module, _NOTHING) if _written else _NOTHING
    for name, value in module.__dict__.items():
        if name in written:
            continue
        if name not in _BOOKKEEPING:
            parts += name, value if type(value) in _SCALARS else _value(value, seen, configs)
        elif name in _HOOKS and value:
            parts += name, *value  # ids of handles, which are never given twice
        elif name in _WEIGHTS:
            for weight, tensor in value.items():
                if tensor is not None:
                    parts += weight, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
                    if type(tensor) not in _PLAIN_WEIGHTS:
                        _describe_wrapped(tensor, parts, seen, configs)


def _describe_wrapped(tensor: torch.Tensor, parts: list[Any], seen: dict[int, Any], configs: list[Any]) -> None:
    """Describe a weight that is made of others, as quantisers': the forms of those, and what it says of itself."""
    parts.append(type(tensor))
    for name, value in vars(tensor).items():
        if isinstance(value, torch.Tensor):
            parts += name, value.shape, value.stride(), value.dtype, value.device
        else:
            parts += name, _value(value, seen, configs)


def _value(value: Any, seen: dict[int, Any], configs: list[Any]) -> Any:
    """Return something hashable that tells the value from another one. Collects the configurations it meets."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if id(value) in seen:
        return seen[id(value)]
    if issubclass(kind, PreTrainedConfig):
        configs.append(value)
    if not issubclass(kind, _CONTAINERS):
        with suppress(TypeError):  # some have no weak references
            same = seen[id(value)] = Same(value)
            return same
    seen[id(value)] = kind  # for as long as it is looked at: it may hold itself
    try:
        if issubclass(kind, dict):
            return tuple((_value(key, seen, configs), _value(entry, seen, configs)) for key, entry in value.items())
        if issubclass(kind, (list, tuple)):
            return tuple(_value(entry, seen, configs) for entry in value)
        if issubclass(kind, (set, frozenset)):
            return frozenset(_value(entry, seen, configs) for entry in value)
        return kind, _value(_parts(value), seen, configs)
    finally:
        del seen[id(value)]


def _parts(value: Any) -> Any:
    """Return what a copy of something without weak references would be made of: a slice, a number of another library.

    What cannot be copied either (views, iterators) is what lies at its address.
    """
    try:
        parts = value.__reduce_ex__(2)
    except Exception:  # whatever its class raises
        return id(value)
    return parts[:3] if isinstance(parts, tuple) else parts
