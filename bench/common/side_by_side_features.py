"""What each library of the side-by-side table offers, every cell with the place in its source that says so.

Read in transformers 5.24.0 and economize 0.3.2. A test looks each place up in what is installed. A cell that is missing
was not found or not verified; it does not say that there is nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.common.report import table

__all__ = ["COLUMNS", "FEATURES", "Fact", "document", "markdown", "missing_evidence"]


class Fact(NamedTuple):
    """A cell and where it can be seen."""

    text: str
    path: str  # from the folder that holds the package
    evidence: str  # stands in that file


COLUMNS = {"sequoia_kernels": "sequoia-kernels", "transformers": "transformers, assisted", "economize": "economize"}


def _facts(**cells: tuple[str, str, str]) -> dict[str, Fact]:
    return {package: Fact(text, f"{package}/{path}", found) for package, (text, path, found) in cells.items()}


FEATURES: dict[str, dict[str, Fact]] = {
    "a second model drafts": _facts(
        sequoia_kernels=("trees", "drafts/model.py", "class ModelDraft"),
        transformers=("chains", "generation/candidate_generator.py", "class AssistedCandidateGenerator"),
        economize=("chains", "techniques/draft_model/drafter.py", "class DraftModelDrafter"),
    ),
    "other drafters": _facts(
        sequoia_kernels=("a `DraftSource` of one's own", "drafts/source.py", "class DraftSource"),
        transformers=("prompt lookup, early exit, MTP", "generation/utils.py", "generation_config.use_mtp"),
        economize=(
            "prompt lookup, early exit, layer skipping, jump, EAGLE-3, Medusa (trees), MTP, registered ones",
            "techniques/medusa/trees.py",
            "MEDUSA_TREES",
        ),
    ),
    "trains drafters": _facts(economize=("yes", "train/loop.py", "def fit(")),
    "draft with another tokenizer": _facts(
        sequoia_kernels=("refused", "hf.py", "assistant_tokenizer must not be given"),
        transformers=("yes", "generation/candidate_generator.py", "class UniversalSpeculativeDecodingGenerator"),
        economize=("refused", "techniques/draft_model/technique.py", "uses another tokenizer than the model"),
    ),
    "batches": _facts(
        sequoia_kernels=("yes, ragged", "decoding/generation.py", "for a batch one for each"),
        transformers=("refused", "generation/utils.py", "assisted generate is only supported for batch_size = 1"),
        economize=("yes, ragged", "core/model.py", "def decode_batch("),
    ),
    "lossless sampling": _facts(
        sequoia_kernels=("trees, two rules", "ops/verify_tree/op.py", "traversal"),
        transformers=("chains", "generation/utils.py", "def _speculative_sampling("),
        economize=("chains and trees; lossy modes, too", "decoding/verifiers.py", "def verify_tree("),
    ),
    "logits processors": _facts(
        sequoia_kernels=("on every node", "decoding/processors.py", "class ProcessorHook"),
        transformers=("on every position", "generation/utils.py", "logits_processor(candidate_input_ids["),
        economize=("by its `generate`", "integrations/_generation_args.py", "class ProcessedSelector"),
    ),
    "grammars": _facts(
        sequoia_kernels=("matchers, or allowed tokens", "decoding/grammar.py", "class GrammarHook"),
        transformers=("allowed tokens", "generation/logits_process.py", "class PrefixConstrainedLogitsProcessor"),
    ),
    "streamers": _facts(
        sequoia_kernels=("batches", "decoding/streaming.py", "class BatchStreamer"),
        transformers=("one request", "generation/utils.py", "streamer.put(valid_tokens.cpu())"),
        economize=("one request, by its `generate`", "integrations/generate.py", "streamers support batch size 1"),
    ),
    "caches": _facts(
        sequoia_kernels=("static; paged for the ops alone", "models/cache.py", "preallocated rows"),
        transformers=("dynamic or static", "generation/utils.py", "StaticCache("),
        economize=("static; quantised, evicting", "runtime/cache.py", "class StaticKVCache"),
    ),
    "quantised targets": _facts(
        sequoia_kernels=("int8, int4, GPTQ natively on a CPU", "models/quantised.py", "torchao's weight-only int8"),
        transformers=("its quantisers", "quantizers/auto.py", "AUTO_QUANTIZER_MAPPING"),
        economize=("transformers' quantisers and its own", "integrations/quantized.py", "describe_quantization"),
    ),
    "chooses how much to draft": _facts(
        sequoia_kernels=("plans a tree from measured costs", "planner/plan.py", "def plan_tree("),
        transformers=("heuristic, confidence", "generation/candidate_generator.py", "heuristic_transient"),
        economize=("confidence", "decoding/policies.py", "class ConfidenceStop"),
    ),
    "CUDA graphs, compiling": _facts(
        sequoia_kernels=("the whole step", "cuda_graphs.py", "def capture("),
        transformers=(
            "compiles the target's forward, with a static cache",
            "generation/utils.py",
            "self.get_compiled_call(generation_config.compile_config)",
        ),
        economize=("draft steps and exact passes", "decoding/graphs.py", "class DecodeGraphs"),
    ),
    "forwards on a CPU": _facts(
        sequoia_kernels=("native, most dense families", "models/native.py", "class NativeForward"),
        transformers=("its modules", "modeling_layers.py", "class GradientCheckpointingLayer"),
        economize=("transformers' modules", "runtime/runner.py", "class LayerRunner"),
    ),
    "vLLM": _facts(economize=("export, plugin", "backends/vllm/plugin.py", "vllm")),
}  # fmt: skip


def missing_evidence(package: str) -> list[str]:
    """What an installed package's source does not say any more."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"missing_evidence: package must be installed, got {package}")
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return [
        f"{name}: {fact.path} has no {fact.evidence!r}"
        for name, cells in FEATURES.items()
        for column, fact in cells.items()
        if column == package
        and not ((root / fact.path).is_file() and fact.evidence in (root / fact.path).read_text(encoding="utf-8"))
    ]


def document() -> dict[str, dict[str, dict[str, str]]]:
    """The cells with their evidence, for JSON."""
    return {name: {column: fact._asdict() for column, fact in cells.items()} for name, cells in FEATURES.items()}


def markdown() -> str:
    """The table; a dash stands where nothing was found or verified."""
    rows = [
        [name, *(cells[column].text if column in cells else "-" for column in COLUMNS)]
        for name, cells in FEATURES.items()
    ]
    return table(["", *COLUMNS.values()], rows, left=1 + len(COLUMNS))
