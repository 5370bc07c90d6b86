"""The decoding loop: draft -> verify -> commit, on Hugging Face models."""

from sequoia_kernels.decoding.engine import DecodingEngine, release_engines
from sequoia_kernels.decoding.generation import GenerateOutput, generate
from sequoia_kernels.decoding.grammar import GrammarHook, GrammarMatcher
from sequoia_kernels.decoding.logits_hook import LogitsHook, NodePaths
from sequoia_kernels.decoding.overhead import PROBE_TREE, measure_overhead, probe_tree
from sequoia_kernels.decoding.recording import RECORD_TREE, record_steps
from sequoia_kernels.decoding.stats import GenerateStats
from sequoia_kernels.decoding.step import DecodingStep

__all__ = [
    "PROBE_TREE",
    "RECORD_TREE",
    "DecodingEngine",
    "DecodingStep",
    "GenerateOutput",
    "GenerateStats",
    "GrammarHook",
    "GrammarMatcher",
    "LogitsHook",
    "NodePaths",
    "generate",
    "measure_overhead",
    "probe_tree",
    "record_steps",
    "release_engines",
]
