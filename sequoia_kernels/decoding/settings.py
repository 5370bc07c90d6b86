"""Settings of a model's generation_config that `generate` does not apply: named once instead of dropped silently."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["warn_of_ignored_settings", "warn_once"]

logger = logging.getLogger("sequoia_kernels")

# Settings that change which tokens transformers' own loop emits, with the values (besides None) at which they do not.
IGNORED: dict[str, tuple[Any, ...]] = {
    "dola_layers": (), "exponential_decay_length_penalty": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "max_time": (), "top_h": (), "watermarking_config": (), "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "min_length": (0,),
    "min_new_tokens": (0,), "min_p": (0,), "no_repeat_ngram_size": (0,), "penalty_alpha": (0,),
    "assistant_ensemble_weight": (0, 1), "encoder_repetition_penalty": (1,), "guidance_scale": (1,),
    "num_beam_groups": (1,), "num_beams": (1,), "num_return_sequences": (1,), "repetition_penalty": (1,),
    "typical_p": (1,), "bad_words_ids": ([],), "begin_suppress_tokens": ([],), "constraints": ([],),
    "force_words_ids": ([],), "stop_strings": ([],), "suppress_tokens": ([],), "sequence_bias": ({}, []),
    "remove_invalid_values": (False,), "token_healing": (False,),
}  # fmt: skip
# These act on drawn tokens only: where neither checkpoint nor call samples they do nothing.
_OF_SAMPLING: dict[str, tuple[Any, ...]] = {"top_k": (0,), "top_p": (1,)}

_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def warn_once(model: Any, text: str) -> None:
    """Log a warning, once for each model and text."""
    texts = _warned.setdefault(model, set())
    if text not in texts:
        texts.add(text)
        logger.warning("%s", text)


def warn_of_ignored_settings(
    model: Any, temperatures: Sequence[float], top_k: Any | None, top_p: Any | None, stop_strings: Sequence[str]
) -> None:
    """Name, in one warning a model, what its generation_config asks for and `generate` does not do.

    A checkpoint that asks for sampling is decoded greedily where all temperatures are 0.
    """
    config = getattr(model, "generation_config", None)
    given = {"stop_strings": bool(stop_strings), "top_k": top_k is not None, "top_p": top_p is not None}
    ignored = dict(IGNORED)
    samples = any(temperature > 0 for temperature in temperatures)
    asks = bool(getattr(config, "do_sample", None))
    if samples or asks:
        ignored |= _OF_SAMPLING
    if asks and not samples:
        ignored |= {"do_sample": (), "temperature": ()}
    found = {name: getattr(config, name, None) for name in ignored if not given.get(name)}
    active = [
        f"{name}={reprlib.repr(value)}"
        for name, value in found.items()
        if value is not None and value not in ignored[name]
    ]
    if active:
        warn_once(
            model,
            f"generate: the target's generation_config asks for {', '.join(sorted(active))}, which is not applied; "
            "temperature, top_k, top_p, eos_token_id, stop_strings and max_new_tokens are arguments of generate",
        )
