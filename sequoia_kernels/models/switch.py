"""The attention function of a model while a forward runs, and the one it had before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.guard import guarded, release_if_owned

__all__ = ["ATTENTION_FIELD", "AttentionSwitch", "attention_configs", "each_module"]

Result = TypeVar("Result")

# The internal field, as transformers' own switch writes it: the public one recurses and checks at every call.
ATTENTION_FIELD = "_attn_implementation_internal"
# By id of the configuration, for as long as that lives.
_locks: dict[int, Any] = {}


class AttentionSwitch:
    """Sets the attention function of all of a model's configurations while a forward runs, and puts the old ones back.

    Every configuration has a lock, so forwards take turns that would write the same one: those of one model, and those
    of models that share layers.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self._name = name
        # Everybody takes the locks in one order, so that no two wait for each other.
        self._configs = sorted(attention_configs(model), key=id)
        self._locks = [_lock_of(config) for config in self._configs]

    def run(self, function: Callable[[], Result]) -> Result:
        """Call a function with this attention and without gradients, not from within another such call of it."""
        if any(lock._is_owned() for lock in self._locks):
            raise RuntimeError("forward: the model must not be run from within a forward of its own, got such a call")
        places = list(zip([config.__dict__ for config in self._configs], self._locks, strict=True))
        saved: dict[int, Any] = {}
        gradients = torch.is_grad_enabled()

        def enter() -> None:
            torch.set_grad_enabled(False)
            for index, (fields, lock) in enumerate(places):
                lock.acquire()
                saved[index] = fields[ATTENTION_FIELD]
                fields[ATTENTION_FIELD] = self._name

        def leave() -> None:
            torch.set_grad_enabled(gradients)
            for index, (fields, lock) in enumerate(places):
                if lock._is_owned():
                    fields[ATTENTION_FIELD] = saved.get(index, fields[ATTENTION_FIELD])
                    lock.release()

        return guarded(enter, function, leave)

    def at_rest(self, function: Callable[[], Result]) -> Result:
        """Call a function while no other thread's forward has its attention in the configurations."""
        locks = [lock for lock in self._locks if not lock._is_owned()]  # those are released by the call that took them

        def leave() -> None:
            for lock in locks:
                release_if_owned(lock)

        return guarded(lambda: [lock.acquire() for lock in locks], function, leave)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Return the configurations that the model's modules read their attention function from."""
    configs = {id(model.config): model.config}
    for module in each_module(model):
        config = module.__dict__.get("config")
        if config is not None and id(config) not in configs and hasattr(config, ATTENTION_FIELD):
            configs[id(config)] = config
    return list(configs.values())


def each_module(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module once, as `model.modules()` does in a fourth of the time: this runs in every forward."""
    seen = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            yield module
            waiting.extend(module._modules.values())


def _lock_of(config: Any) -> Any:
    """Return the configuration's lock. One that can be asked whether this thread holds it."""
    if id(config) not in _locks:
        weakref.finalize(config, _locks.pop, id(config), None)
    return _locks.setdefault(id(config), threading.RLock())
