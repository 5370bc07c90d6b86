"""Whether all of a model is in evaluation mode, which every forward asks."""

from __future__ import annotations

from functools import cache
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.models.switch import each_module

__all__ = ["EvaluationCheck"]


class EvaluationCheck:
    """Refuses dropout anywhere in a model: adapters that are added later begin in training mode, whatever it is in.

    Keeps who the modules were when it last looked, so that a check compares references and reads flags.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._look()

    def check(self) -> None:
        """Look at the model as it is now; ValueError where a module in it may compute something else in training."""
        if any(self._leaves) or any(tuple(children.values()) != known for children, known in self._parents):
            self._look()
        for fields in self._heeding:
            if fields["training"]:
                break
        else:
            if not any(module.training for module in self._unusual):
                return
        name = next(name for name, module in self._model.named_modules() if module.training and _heeds_mode(module))
        where = f" in {name}" if name else ""
        raise ValueError(f"adapt: model must be in evaluation mode, got training mode{where}; call model.eval()")

    def _look(self) -> None:
        modules = list(each_module(self._model))
        self._leaves = [module._modules for module in modules if not module._modules]
        self._parents = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        heeding = [module for module in modules if _heeds_mode(module)]
        self._heeding = [module.__dict__ for module in heeding if "training" in module.__dict__]
        self._unusual = [module for module in heeding if "training" not in module.__dict__]  # compiled, scripted


def _heeds_mode(module: nn.Module) -> bool:
    """Tell whether a module may compute something else in training mode.

    Of torch's own only those that ask: linear layers, lists and quantised layers begin in training mode wherever a
    model is cut, resized or quantised. Those with hooks or a function in the place of their forward may be
    asked, and scripted ones do not show what they do.
    """
    kind = type(module)
    if not kind.__module__.startswith("torch."):
        return kind.forward is not nn.Module.forward
    if module._forward_hooks or module._forward_pre_hooks or "training" not in module.__dict__:
        return True
    if isinstance(module.__dict__.get("forward"), (FunctionType, MethodType)):
        return True
    return _asks_for_mode(kind)  # type: ignore[arg-type]  # a class is hashable, whatever its objects are


@cache
def _asks_for_mode(kind: Any) -> bool:
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    codes = [getattr(method, "__code__", None) for parent in own for method in vars(parent).values()]
    return any("training" in code.co_names for code in codes if code is not None)
