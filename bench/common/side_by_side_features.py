"""What each library of the side-by-side table offers, every cell with the place in its source that says so.

Read in transformers 5.24.0 and economize 0.3.2. A test looks each place up in what is installed. A cell that is missing
was not found or not verified; it does not say that there is nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bench.common.report import table

__all__ = ["COLUMNS", "FEATURES", "Fact", "document", "markdown", "missing_evidence"]


class Fact(NamedTuple):
    """A cell and where it can be seen."""

    text: str
    evidence: Mapping[str, str]  # file, from the folder that holds the package -> what stands in it


COLUMNS = {"sequoia_kernels": "sequoia-kernels", "transformers": "transformers, assisted", "economize": "economize"}


def _facts(**cells: tuple[str, dict[str, str]]) -> dict[str, Fact]:
    return {
        package: Fact(text, {f"{package}/{path}": found for path, found in evidence.items()})
        for package, (text, evidence) in cells.items()
    }


GENERATORS, UTILS = "generation/candidate_generator.py", "generation/utils.py"

FEATURES: dict[str, dict[str, Fact]] = {
    "a second model drafts": _facts(
        sequoia_kernels=("trees", {"drafts/model.py": "class ModelDraft"}),
        transformers=("chains", {GENERATORS: "class AssistedCandidateGenerator"}),
        economize=("chains", {"techniques/draft_model/drafter.py": "class DraftModelDrafter"}),
    ),
    "other drafters": _facts(
        sequoia_kernels=("EAGLE-3, P-EAGLE, DFlash, DSpark, Medusa, MTP, early exit, lookup (as trees), one's own", {
            "drafts/eagle3/draft.py": "class Eagle3Draft", "drafts/dflash/source.py": "class DFlashDraft",
            "drafts/medusa.py": "class MedusaDraft", "drafts/mtp.py": "class MtpDraft",
            "drafts/layers.py": "class LayersDraft", "drafts/lookup.py": "class LookupDraft",
            "drafts/source.py": "class DraftSource",
        }),
        transformers=("prompt lookup, early exit, MTP", {
            UTILS: "candidate_generator = MTPCandidateGenerator(", GENERATORS: "class PromptLookupCandidateGenerator",
            "generation/configuration_utils.py": "assistant_early_exit",
        }),
        economize=("prompt lookup, early exit, layer skipping, jump, EAGLE-3, Medusa (trees), MTP, registered ones", {
            "techniques/lookup/technique.py": "class LookupTechnique",
            "techniques/early_exit/technique.py": "class EarlyExitTechnique",
            "techniques/layer_skip/technique.py": "class LayerSkipTechnique",
            "techniques/jump/technique.py": "class JumpTechnique",
            "techniques/eagle3/technique.py": "class Eagle3Technique",
            "techniques/medusa/trees.py": "MEDUSA_TREES",
            "techniques/vendor_mtp/technique.py": "class VendorMTPTechnique",
            "core/technique.py": "def register_technique",
        }),
    ),
    "trains drafters": _facts(economize=("yes", {"train/loop.py": "def fit("})),
    "draft with another tokenizer": _facts(
        sequoia_kernels=("yes", {"drafts/vocabulary.py": "def pair_tokens"}),
        transformers=("yes", {GENERATORS: "class UniversalSpeculativeDecodingGenerator"}),
        economize=("refused", {"techniques/draft_model/technique.py": "uses another tokenizer than the model"}),
    ),
    "batches": _facts(
        sequoia_kernels=("yes, ragged", {"decoding/generation.py": "padding, which may stand on either side"}),
        transformers=("refused", {UTILS: "assisted generate is only supported for batch_size = 1"}),
        economize=("yes, ragged", {"core/model.py": "def decode_batch("}),
    ),
    "lossless sampling": _facts(
        sequoia_kernels=("trees, two rules", {
            "ops/verify_tree/reference.py": 'Here is the rule "sequoia"', "ops/verify_tree/traversal.py": "traversal",
        }),
        transformers=("chains", {UTILS: "def _speculative_sampling("}),
        economize=("chains and trees; lossy modes, too", {"decoding/verifiers.py": "recursive rejection sampling"}),
    ),
    "logits processors": _facts(
        sequoia_kernels=("on every node", {"decoding/processors.py": "class ProcessorHook"}),
        transformers=("on every position", {UTILS: "logits_processor(candidate_input_ids["}),
        economize=("by its `generate`", {"integrations/_generation_args.py": "class ProcessedSelector"}),
    ),
    "grammars": _facts(
        sequoia_kernels=("matchers, or allowed tokens", {
            "decoding/grammar.py": "class GrammarHook", "decoding/generation.py": "prefix_allowed_tokens_fn",
        }),
        transformers=("allowed tokens", {"generation/logits_process.py": "class PrefixConstrainedLogitsProcessor"}),
    ),
    "streamers": _facts(
        sequoia_kernels=("batches", {"decoding/streaming.py": "class BatchStreamer"}),
        transformers=("one request", {UTILS: "streamer.put(valid_tokens.cpu())"}),
        economize=("one request, by its `generate`", {"integrations/generate.py": "streamers support batch size 1"}),
    ),
    "caches": _facts(
        sequoia_kernels=("static; paged for the ops alone", {
            "models/cache.py": "preallocated rows", "interop/caches.py": "Paged caches",
        }),
        transformers=("dynamic or static", {UTILS: "StaticCache("}),
        economize=("static; quantised, evicting", {
            "runtime/cache.py": "class StaticKVCache", "techniques/kv_quant/kivi.py": "register_technique",
            "techniques/kv_evict/technique.py": "register_technique",
        }),
    ),
    "quantised targets": _facts(
        sequoia_kernels=("int8, int4, GPTQ natively on a CPU", {"models/quantised.py": "torchao's weight-only int8"}),
        transformers=("its quantisers", {"quantizers/auto.py": "AUTO_QUANTIZER_MAPPING"}),
        economize=("transformers' quantisers and its own", {
            "integrations/quantized.py": "describe_quantization", "techniques/quant/technique.py": "register_technique",
        }),
    ),
    "chooses how much to draft": _facts(
        sequoia_kernels=("plans a tree from measured costs", {"planner/plan.py": "def plan_tree("}),
        transformers=("heuristic, confidence", {GENERATORS: "assistant_confidence_threshold"}),
        economize=("confidence", {"decoding/policies.py": "class ConfidenceStop"}),
    ),
    "CUDA graphs, compiling": _facts(
        sequoia_kernels=("the whole step", {"cuda_graphs.py": "def capture("}),
        transformers=("compiles the target's forward, with a static cache", {
            UTILS: "self.get_compiled_call(generation_config.compile_config)",
        }),
        economize=("draft steps and exact passes", {"decoding/graphs.py": "class DecodeGraphs"}),
    ),
    "forwards on a CPU": _facts(
        sequoia_kernels=("native, most dense families", {"models/native.py": "class NativeForward"}),
        transformers=("its modules", {"models/llama/modeling_llama.py": "class LlamaDecoderLayer"}),
        economize=("transformers' modules", {"runtime/runner.py": "class LayerRunner"}),
    ),
    "vLLM": _facts(
        sequoia_kernels=("plugin: trees by load", {"vllm/runner.py": "class TreeWorker"}),
        economize=("export, plugin", {
            "backends/vllm/export.py": "export", "backends/vllm/plugin.py": "vllm",
        }),
    ),
}  # fmt: skip


def missing_evidence(package: str) -> list[str]:
    """What an installed package's source does not say any more."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"missing_evidence: package must be installed, got {package}")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return [
        f"{name}: {path} has no {found!r}"
        for name, cells in FEATURES.items()
        if package in cells
        for path, found in cells[package].evidence.items()
        if not ((root / path).is_file() and found in (root / path).read_text(encoding="utf-8"))
    ]


def document() -> dict[str, dict[str, dict[str, Any]]]:
    """The cells with their evidence, for JSON."""
    return {name: {column: fact._asdict() for column, fact in cells.items()} for name, cells in FEATURES.items()}


def markdown() -> str:
    """The table; a dash stands where nothing was found or verified."""
    rows = [
        [name, *(cells[column].text if column in cells else "-" for column in COLUMNS)]
        for name, cells in FEATURES.items()
    ]
    return table(["", *COLUMNS.values()], rows, left=1 + len(COLUMNS))
