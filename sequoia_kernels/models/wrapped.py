"""The transformers model inside an adapter library's wrapper (PEFT's `PeftModel`).

Nothing is imported from such a library: a wrapper is told by what it has. Which adapters are active and merged is kept
in the model's own modules, so the model inside computes what the wrapper does, unless the wrapper looks at the tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sequoia_kernels.errors import UnsupportedModelError

__all__ = ["unwrapped"]

# Forwards of the part between wrapper and model that call the model, and change no logits.
_PASSES_ON = ("BaseTuner.forward", "AdaLoraModel.forward")


def unwrapped(model: Any) -> Any:
    """Return the model inside a wrapper, and everything else as it is.

    Args:
        model: whatever was given as a model.

    Returns:
        The model that the wrapper calls.

    Raises:
        UnsupportedModelError: the wrapper does more than to call it: it puts tokens in front of the prompt, looks for
            tokens in it, or runs the model several times.
    """
    configs = getattr(model, "peft_config", None)
    tuner: Any = type(getattr(model, "base_model", None))
    base_model = getattr(model, "get_base_model", None)
    if not isinstance(model, nn.Module) or not isinstance(configs, dict) or base_model is None:
        return model
    for name, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        problem = None
        if getattr(config, "is_prompt_learning", False):
            problem = "puts virtual tokens in front of the prompt"
        elif getattr(config, "alora_invocation_tokens", None) is not None:
            problem = "begins at tokens that are looked for in the prompt"
        elif getattr(getattr(tuner, "forward", None), "__qualname__", "") not in _PASSES_ON:
            problem = f"runs the model by a forward of its own ({tuner.__name__}.forward)"
        if problem is not None:
            raise UnsupportedModelError(
                f"adapt: model must compute by its modules alone, got a {type(model).__name__} whose adapter {name!r} "
                f"({kind}) {problem}; the model without it is its get_base_model()"
            )
    return base_model()
