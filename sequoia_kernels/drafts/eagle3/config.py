"""What the config.json of an EAGLE-3 head says: the original form and the one of the library speculators.

Numbers of the target's layers are read in two ways. Ids of the speculators form, and ids at the top of an original
config, are numbers of `hidden_states`: i is the input of layer i. Ids within `eagle_config` count outputs of layers, so
id i is `hidden_states[i + 1]`: the heads that carry such ids were trained on [1, L // 2 - 1, L - 4] where those without
any were trained on `hidden_states` 2, L // 2 and L - 3, which are the same three. Folders that were converted may go
another way, so the other reading is kept beside it: `readings.py` measures both. Wrong hidden states cost acceptance
and nothing else.

A P-EAGLE head of the original form is what vLLM loads for its parallel drafting: a config like any other, with the
token of what is not known yet as `ptd_token_id` or `pard_token`, or as `mask_token_id` beside `parallel_drafting`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sequoia_kernels.documents import is_integer
from sequoia_kernels.drafts.folders import MAX_LAYERS, DraftFolder, check_layer_config

__all__ = ["HeadConfig", "is_eagle3"]

_MODELS = ("eagle3", "peagle")  # of the speculators form
_FAMILIES = ("llama", "qwen3")  # whose layers a head may have
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the text's length
_MASK_TOKENS = ("ptd_token_id", "pard_token", "mask_token_id")  # of the original form
_MOST_DEPTHS = 256  # rows that a forward may be asked for beside the accepted tokens
_DEFAULT_DEPTHS = 8  # rows that a parallel head gives where its config does not say how many it was trained for

# Options of an `eagle_config` that say what every head does here; another value would ask for other arithmetic.
_FIXED_OPTIONS: dict[str, Any] = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
_SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_OF_FURTHER_HEADS = "parallel_draft_heads_num_layers"  # which one draft step has none of
# Of the speculators form: what is read, and what says nothing about the arithmetic.
_READ = {"transformer_layer_config", "draft_vocab_size", "speculators_config", "mask_token_id", _LAYER_IDS, *_SWITCHES}
_SILENT = {
    "speculators_model_type", "speculators_version", "architectures", "auto_map", "dtype", "torch_dtype", "model_type",
    "transformers_version", "target_hidden_size", "embed_requires_grad", "tie_word_embeddings", "_name_or_path",
    "has_no_defaults_at_init", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id",
    "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "num_labels",
}  # fmt: skip


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Tell an EAGLE-3 or P-EAGLE head by its config."""
    if "speculators_model_type" in config:
        return config["speculators_model_type"] in _MODELS
    names = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if any(part in name.lower() for name in names for part in _MODELS):
        return True
    # Some original folders name a plain language model, which has no vocabulary of a draft.
    plain = any(name in ("LlamaForCausalLM", "Qwen3ForCausalLM") for name in names)
    return plain and "draft_vocab_size" in config and "dflash_config" not in config


@dataclass(frozen=True)
class HeadConfig:
    """How a head computes.

    Attributes:
        layer_config: a transformers configuration of its layers.
        draft_vocab_size: width of its logits.
        feature_layers: hidden states of the target that it reads, in order; None where the folder leaves that open.
        num_features: how many they are.
        other_layers: the same ids read the other way, which may be out of range; None where there are none.
        norm_before_residual: whether the normed feature, not the feature itself, is the first layer's residual.
        norm_before_fc: whether one norm goes over all features before they are projected.
        fc_norm: whether each has a norm of its own.
        norm_output: whether the normed output is the feature of the next level.
        mask_token_id: the token that a parallel head is fed for what is not known yet; None for other heads.
        num_depths: rows that one forward gives; 1 but for a parallel head.
    """

    layer_config: Any
    draft_vocab_size: int
    feature_layers: tuple[int, ...] | None
    num_features: int
    other_layers: tuple[int, ...] | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    mask_token_id: int | None = None
    num_depths: int = 1

    @classmethod
    def read(cls, folder: DraftFolder) -> HeadConfig:
        """Read the config of a folder.

        Raises:
            ValueError: an option is missing, out of range or not understood.
        """
        config = folder.config
        return _read_speculators(folder, config) if "speculators_model_type" in config else _read_original(folder)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        given = getattr(self.layer_config, "head_dim", None)
        return int(given or self.layer_config.hidden_size // self.layer_config.num_attention_heads)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, None for full attention."""
        config = self.layer_config
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)


def _read_speculators(folder: DraftFolder, config: Mapping[str, Any]) -> HeadConfig:
    for name, value in config.items():
        if name not in _READ | _SILENT and value not in (None, False, [], {}, ""):
            raise ValueError(f"{folder}: config.json must hold options that are known here, got {name} = {value!r:.60}")
    layers = config.get("transformer_layer_config")
    if not isinstance(layers, dict):
        raise ValueError(f"{folder}: transformer_layer_config must be an object, got {layers!r:.60}")
    ids, other = _layer_ids(folder, config.get(_LAYER_IDS), 0)
    layer_config = _layer_config(folder, layers, "qwen3")
    switches = {name: _switch(folder, config, name) for name in _SWITCHES}
    head = HeadConfig(
        layer_config, _count(folder, config, "draft_vocab_size"), ids, len(ids or (0, 0, 0)), other, **switches
    )  # fmt: skip
    if config["speculators_model_type"] == "peagle":
        mask_token_id = _count(folder, config, "mask_token_id", least=0)
        head = replace(head, mask_token_id=mask_token_id, num_depths=_trained_depths(folder))
    return _checked(folder, head)


def _read_original(folder: DraftFolder) -> HeadConfig:
    config = folder.config
    options = config.get("eagle_config") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{folder}: eagle_config must be an object, got {options!r:.60}")
    for name, value in options.items():
        if name in _FIXED_OPTIONS:
            if value not in (None, _FIXED_OPTIONS[name]):
                raise ValueError(f"{folder}: eagle_config.{name} must be {_FIXED_OPTIONS[name]}, got {value!r:.60}")
        elif name not in (_LAYER_IDS, _OF_FURTHER_HEADS, *_SWITCHES) and value not in (
            None,
            False,
            [],
            {},
            "",
        ):
            rule = "must hold options that are known here"
            raise ValueError(f"{folder}: eagle_config {rule}, got {name} = {value!r:.60}")
    ids, other = _layer_ids(folder, options.get(_LAYER_IDS), 1)  # they count outputs; see above
    if ids is None:
        ids, other = _layer_ids(folder, config.get(_LAYER_IDS), 0)
    num_features = _count(folder, config, "num_aux_hidden_states", default=len(ids or (0, 0, 0)))
    if ids is not None and num_features != len(ids):
        raise ValueError(f"{folder}: num_aux_hidden_states must be the {len(ids)} of {_LAYER_IDS}, got {num_features}")
    layer_config = _layer_config(folder, config, "llama")
    vocab_size = _count(folder, config, "draft_vocab_size", default=layer_config.vocab_size)
    given = {**config, **{name: value for name, value in options.items() if value is not None}}
    switches = {name: _switch(folder, given, name) for name in _SWITCHES}
    head = HeadConfig(layer_config, vocab_size, ids, num_features, other, **switches)
    mask_token_id = _mask_token(folder, config, layer_config.vocab_size)
    if mask_token_id is not None:
        num_depths = _count(folder, config, "num_depths", default=_DEFAULT_DEPTHS)
        head = replace(head, mask_token_id=mask_token_id, num_depths=num_depths)
    return _checked(folder, head)


def _mask_token(folder: DraftFolder, config: Mapping[str, Any], num_tokens: int) -> int | None:
    """Read which token a head of the original form is fed for what is not known yet; None of one that is not parallel.

    A `mask_token_id` alone may be a tokenizer's: it says nothing where parallel drafting is not on.
    """
    is_parallel = _switch(folder, config, "parallel_drafting")
    names = [name for name in _MASK_TOKENS if config.get(name) is not None]
    is_open = config.get("parallel_drafting") is None
    if not is_parallel and not (is_open and {*names} - {"mask_token_id"}):
        return None
    if not names:
        rule = f"must give one of {', '.join(_MASK_TOKENS)}, since parallel_drafting is on"
        raise ValueError(f"{folder}: {rule}, got none")
    tokens = {name: _count(folder, config, name, least=0) for name in names}
    if len(set(tokens.values())) > 1:
        raise ValueError(f"{folder}: {' and '.join(names)} must be one token, got {list(tokens.values())}")
    if tokens[names[0]] >= num_tokens:
        raise ValueError(f"{folder}: {names[0]} must be in 0..{num_tokens - 1}, got {tokens[names[0]]}")
    return tokens[names[0]]


def _checked(folder: DraftFolder, head: HeadConfig) -> HeadConfig:
    if head.norm_before_fc and head.fc_norm:
        raise ValueError(f"{folder}: norm_before_fc and fc_norm must not both be on, got both")
    if head.feature_layers is None and head.num_features != 3:
        raise ValueError(f"{folder}: {_LAYER_IDS} must name {head.num_features} layers of the target, got none")
    if head.num_depths > _MOST_DEPTHS:
        raise ValueError(f"{folder}: must propose at most {_MOST_DEPTHS} tokens at once, got {head.num_depths}")
    return head


def _layer_config(folder: DraftFolder, fields: Mapping[str, Any], usual: str) -> Any:
    """Make transformers' configuration of the layers; refuse what these layers are not."""
    from transformers import CONFIG_MAPPING

    family = fields.get("model_type") or usual
    if family not in _FAMILIES:
        raise ValueError(f"{folder}: its layers must be of the family {' or '.join(_FAMILIES)}, got {family!r}")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        _count(folder, fields, name)
    if fields["num_hidden_layers"] > MAX_LAYERS:
        raise ValueError(f"{folder}: num_hidden_layers must be at most {MAX_LAYERS}, got a larger number")
    try:
        config = CONFIG_MAPPING[family].from_dict(dict(fields))
    except Exception as error:  # transformers' checks raise classes of their own
        raise ValueError(f"{folder}: must hold a configuration of {family} layers, got: {error}") from error
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        raise ValueError(
            f"{folder}: rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope.get('rope_type', rope)!r}"
        )
    types = getattr(config, "layer_types", None)
    if types is not None:
        strange = set(types) - {"full_attention", "sliding_attention"}
        if strange or len(types) != config.num_hidden_layers:
            rule = f"be full_attention or sliding_attention for each of {config.num_hidden_layers} layers"
            raise ValueError(f"{folder}: layer_types must {rule}, got {types}")
    check_layer_config(config, str(folder))
    return config


def _layer_ids(
    folder: DraftFolder, ids: Any, shift: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | tuple[None, None]:
    """Give the hidden states that ids mean, and those that they mean when they are read the other way."""
    if ids is None or ids == []:
        return None, None
    if not isinstance(ids, Sequence) or not all(is_integer(number) and number + shift >= 0 for number in ids):
        raise ValueError(f"{folder}: {_LAYER_IDS} must be layers of the target, got {ids!r:.60}")
    return tuple(number + shift for number in ids), tuple(number + 1 - shift for number in ids)


def _count(
    folder: DraftFolder, config: Mapping[str, Any], name: str, *, least: int = 1, default: int | None = None
) -> int:
    value = config.get(name, default)
    value = default if value is None else value
    if not is_integer(value) or value < least:
        raise ValueError(f"{folder}: {name} must be an integer of at least {least}, got {value!r:.60}")
    return int(value)


def _switch(folder: DraftFolder, config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value not in (None, True, False):
        raise ValueError(f"{folder}: {name} must be true or false, got {value!r:.60}")
    return bool(value)


def _trained_depths(folder: DraftFolder) -> int:
    """Read how many tokens a parallel head was trained to propose at once."""
    config = folder.config.get("speculators_config")
    methods = config.get("proposal_methods") if isinstance(config, dict) else None
    if not isinstance(methods, list | None):
        raise ValueError(f"{folder}: proposal_methods must be a list, got {methods!r:.60}")
    found = [method.get("speculative_tokens") for method in methods or () if isinstance(method, dict)]
    return max((int(number) for number in found if is_integer(number) and number > 0), default=_DEFAULT_DEPTHS)
