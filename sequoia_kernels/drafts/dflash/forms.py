"""What folders of DFlash and DSpark drafts say of themselves: three forms of a config.json, read into one.

- z-lab's own: `dflash_config` beside a Qwen3 config.
- transformers': the config of its DFlash class (`speculation_type="dflash"`).
- `speculators`: `speculators_model_type` "dflash" or "dspark", the layers' config as `transformer_layer_config`.

The forms number the target's layers in two ways. The first two name layers, whose *outputs* they read, so an id means
transformers' `hidden_states[id + 1]`; `speculators` names hidden states themselves, `hidden_states[id]`. The reading is
part of a form and nothing in a folder says otherwise, so it is decided here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from transformers import AutoConfig, Qwen3Config
from transformers.activations import ACT2FN

from sequoia_kernels.documents import is_count, is_integer, is_number
from sequoia_kernels.drafts.folders import MAX_LAYERS, check_layer_config
from sequoia_kernels.tree import MAX_STEP_ROWS

__all__ = ["HEAD_KINDS", "DFlashForm", "LayerSight", "is_dflash", "read_form"]

HEAD_KINDS = ("vanilla", "gated", "rnn")

_SPECULATORS = ("dflash", "dspark")
_RELATED = ("dflash2", "xpress")  # whose backbone is DFlash's, but not all of it
_TRANSFORMERS = ("muse_glimmer_assistant",)
# Of `dflash_config`, which may also hold what stands beside it.
_UNDERSTOOD = frozenset({
    "block_size", "final_logit_softcapping", "input_embedding_scale", "mask_token_id", "num_target_layers",
    "output_multiplier", "target_layer_ids",
})  # fmt: skip


class LayerSight(NamedTuple):
    """What a layer's queries see. Row i of a block whose first row is at position p is at position p + i.

    Attributes:
        window: a sliding window in tokens; None sees all.
        causal: whether rows see only rows before them of their own block, and themselves.
        from_anchor: the window is that of committed tokens before the block, [p - window, p), for all of its rows and
            reaches all of the block; else a row sees what is less than `window` positions away.
    """

    window: int | None = None
    causal: bool = False
    from_anchor: bool = False


@dataclass(frozen=True)
class DFlashForm:
    """A DFlash or DSpark draft, whatever form it is published in.

    Attributes:
        name: "dflash" or "dspark".
        config: of the layers. The vocabulary in it is that of the tokens that are fed.
        sights: what each layer sees.
        block_size: rows of a forward: the last token and masks.
        mask_token_id: token of the masks.
        needs: hidden states of the target, numbered as transformers' `hidden_states`.
        sample_from_anchor: slot k of a block tells depth k + 1, not depth k.
        draft_vocab_size: width of the head; None as wide as the target's.
        embedding_scale: what embeddings are multiplied by.
        logit_scale: what logits are multiplied by.
        logit_softcap: logits become softcap * tanh(logit / softcap); 0 leaves them.
        markov_kind: of the Markov head, one of `HEAD_KINDS`; None without one.
        markov_rank: numbers of a token in it.
        has_confidence: whether there is a confidence head.
        confidence_reads_token: whether it reads the token's numbers in the Markov head beside the hidden state.
        renamed: parts of weights' names, from the common ones to those of the form.
    """

    name: str
    config: Qwen3Config
    sights: tuple[LayerSight, ...]
    block_size: int
    mask_token_id: int
    needs: tuple[int, ...]
    sample_from_anchor: bool = False
    draft_vocab_size: int | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    markov_kind: str | None = None
    markov_rank: int = 0
    has_confidence: bool = False
    confidence_reads_token: bool = True
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def max_levels(self) -> int:
        """Levels of the deepest tree that a block has rows for, the root's included."""
        return self.block_size + int(self.sample_from_anchor)


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is of a draft with a DFlash backbone, one that `read_form` refuses included."""
    kind = config.get("speculators_model_type")
    if kind is not None:
        return kind in _SPECULATORS + _RELATED
    return "dflash_config" in config or config.get("model_type") in _TRANSFORMERS


def read_form(config: Mapping[str, Any], where: str) -> DFlashForm:
    """Read a config.json.

    Args:
        config: what it holds.
        where: what messages begin with, such as the folder.

    Raises:
        ValueError: something is missing, out of range or not understood; the message names it.
    """
    if config.get("speculators_model_type") is not None:
        return _speculators_form(config, where)
    if config.get("model_type") in _TRANSFORMERS:
        return _transformers_form(config, where)
    return _z_lab_form(config, where)


def _z_lab_form(config: Mapping[str, Any], where: str) -> DFlashForm:
    own = config.get("dflash_config")
    if not isinstance(own, Mapping):
        _refuse(where, "dflash_config", "be an object", own)
    unknown = sorted(own.keys() - _UNDERSTOOD)
    names = [str(name) for name in config.get("architectures") or ()]
    if unknown or any("DFlash2" in name for name in names):
        _refuse(
            where, "dflash_config", f"hold no other options than {', '.join(sorted(_UNDERSTOOD))}", unknown or names
        )

    def option(name: str, default: Any = None) -> Any:
        return own.get(name, config.get(name, default))

    layers = _layer_config(config, where)
    ids = option("target_layer_ids")
    if ids is None:
        ids = _spread_layers(where, option("num_target_layers"), layers.num_hidden_layers)
    causal = config.get("is_causal")  # of all layers; where nothing is said, of sliding ones
    sights = tuple(
        LayerSight(window, causal=kind == "sliding_attention" if causal is None else bool(causal))
        for kind, window in zip(layers.layer_types, _windows(layers), strict=True)
    )
    return DFlashForm(
        "dflash", layers, sights,
        block_size=_block_size(where, option("block_size", 16)),
        mask_token_id=_count(where, "mask_token_id", option("mask_token_id"), 0),
        needs=_needs(where, "target_layer_ids", ids, 1),
        embedding_scale=_number(where, "input_embedding_scale", option("input_embedding_scale", 1.0)),
        logit_scale=_number(where, "output_multiplier", option("output_multiplier", 1.0)),
        logit_softcap=_number(where, "final_logit_softcapping", option("final_logit_softcapping") or 0.0),
    )  # fmt: skip


def _transformers_form(config: Mapping[str, Any], where: str) -> DFlashForm:
    layers = _layer_config(config, where)
    whole = AutoConfig.for_model(**_plain(config))
    # Its masks let a row see what is at most `sliding_window` positions away, on both sides.
    sights = tuple(LayerSight(None if window is None else window + 1) for window in _windows(layers))
    return DFlashForm(
        "dflash", layers, sights,
        block_size=_block_size(where, whole.block_size),
        mask_token_id=_count(where, "mask_token_id", whole.mask_token_id, 0),
        needs=_needs(where, "target_layer_ids", whole.target_layer_ids, 1),
        renamed=(("fc.weight", "encoder.fc.weight"), ("hidden_norm.weight", "encoder.output_norm_enc.weight")),
    )  # fmt: skip


def _speculators_form(config: Mapping[str, Any], where: str) -> DFlashForm:
    kind = config["speculators_model_type"]
    if kind not in _SPECULATORS:
        _refuse(where, "speculators_model_type", f"be one of {', '.join(_SPECULATORS)}", kind)
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, Mapping):
        _refuse(where, "transformer_layer_config", "be an object", inner)
    layers = _layer_config(inner, where)
    both_ways = bool(config.get("sliding_window_non_causal", False))
    sights = tuple(
        LayerSight() if window is None else LayerSight(window, causal=not both_ways, from_anchor=True)
        for window in _windows(layers)
    )
    vocab = _count(where, "draft_vocab_size", config.get("draft_vocab_size", 32000), 1)
    form: dict[str, Any] = {
        "block_size": _block_size(where, config.get("block_size", 8)),
        "mask_token_id": _count(where, "mask_token_id", config.get("mask_token_id"), 0),
        "needs": _needs(where, "aux_hidden_state_layer_ids", config.get("aux_hidden_state_layer_ids"), 0),
        "sample_from_anchor": bool(config.get("sample_from_anchor", kind == "dspark")),
        "draft_vocab_size": None if vocab == layers.vocab_size else vocab,
    }
    if kind == "dspark":
        rank = _count(where, "markov_rank", config.get("markov_rank", 256), 0)
        head = config.get("markov_head_type", "vanilla")
        if head not in HEAD_KINDS:
            _refuse(where, "markov_head_type", f"be one of {', '.join(HEAD_KINDS)}", head)
        form |= {
            "markov_kind": head if rank else None,
            "markov_rank": rank,
            "has_confidence": bool(config.get("enable_confidence_head", True)),
            "confidence_reads_token": bool(config.get("confidence_head_with_markov", True)),
        }
        if form["has_confidence"] and form["confidence_reads_token"] and not rank:
            _refuse(where, "confidence_head_with_markov", "be false where markov_rank is 0", True)
    return DFlashForm(str(kind), layers, sights, **form)


def _layer_config(source: Mapping[str, Any], where: str) -> Qwen3Config:
    """Give the layers' config, with the defaults of the family that it names: files leave those out."""
    num_layers = source.get("num_hidden_layers")
    if is_integer(num_layers) and num_layers > MAX_LAYERS:
        _refuse(where, "num_hidden_layers", f"be at most {MAX_LAYERS}", "a larger number")
    try:
        given = AutoConfig.for_model(**({"model_type": "qwen3"} | _plain(source)))
        rope = getattr(given, "rope_parameters", None) or {}
        rope = rope.get("sliding_attention", rope)  # one for each kind of layers: blocks take that of sliding ones
        config = Qwen3Config(
            vocab_size=getattr(given, "vocab_size", 1),
            hidden_size=given.hidden_size,
            intermediate_size=given.intermediate_size,
            num_hidden_layers=given.num_hidden_layers,
            num_attention_heads=given.num_attention_heads,
            num_key_value_heads=given.num_key_value_heads or given.num_attention_heads,
            head_dim=getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads,
            hidden_act=given.hidden_act,
            rms_norm_eps=given.rms_norm_eps,
            rope_parameters=dict(rope) or None,
            attention_bias=bool(getattr(given, "attention_bias", False)),
            max_position_embeddings=given.max_position_embeddings,
            layer_types=getattr(given, "layer_types", None),
            sliding_window=getattr(given, "sliding_window", None),
            use_sliding_window=True,
            tie_word_embeddings=False,
        )
    except Exception as error:  # transformers checks few of a configuration's values itself
        raise ValueError(f"{where}: its layers' config must be one that transformers knows, got: {error}") from error
    kinds = sorted(set(config.layer_types) - {"full_attention", "sliding_attention"})
    if kinds:
        _refuse(where, "layer_types", "be full_attention or sliding_attention", kinds)
    _count(where, "vocab_size", config.vocab_size, 1)
    if config.hidden_act not in ACT2FN:
        _refuse(where, "hidden_act", "be an activation of transformers'", config.hidden_act)
    check_layer_config(config, where)
    return config


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that a config class takes."""
    return {name: value for name, value in source.items() if name not in ("dflash_config", "transformers_version")}


def _windows(config: Qwen3Config) -> list[int | None]:
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    return [config.sliding_window if slides else None for slides in sliding]


def _spread_layers(where: str, num_target_layers: Any, num_layers: int) -> list[int]:
    """Layers of the target for a z-lab folder that names none: spread from the second to the last but two."""
    count = _count(where, "num_target_layers", num_target_layers, 1)
    if num_layers == 1:
        return [count // 2]
    return [round(1 + index * (count - 4) / (num_layers - 1)) for index in range(num_layers)]


def _needs(where: str, name: str, ids: Any, shift: int) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not ids or not all(is_count(entry, 0) for entry in ids):
        _refuse(where, name, "be a list of layers", ids)
    if len(set(ids)) < len(ids):
        _refuse(where, name, "name every layer once", ids)
    return tuple(int(entry) + shift for entry in ids)


def _count(where: str, name: str, value: Any, least: int) -> int:
    if not is_count(value, least):
        _refuse(where, name, f"be an integer >= {least}", value)
    return int(value)


def _block_size(where: str, value: Any) -> int:
    size = _count(where, "block_size", value, 2)
    if size > MAX_STEP_ROWS:
        _refuse(where, "block_size", f"be at most {MAX_STEP_ROWS}", size)
    return size


def _number(where: str, name: str, value: Any) -> float:
    if not is_number(value):
        _refuse(where, name, "be a number", value)
    return float(value)


def _refuse(where: str, name: str, rule: str, actual: object) -> NoReturn:
    raise ValueError(f"{where}: {name} must {rule}, got {actual!r}") from None
