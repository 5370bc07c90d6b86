"""The decoding loop: draft -> verify -> commit, on Hugging Face models."""

from sequoia_kernels.decoding.loop import DecodingEngine, GenerateOutput, generate
from sequoia_kernels.decoding.stats import GenerateStats

__all__ = ["DecodingEngine", "GenerateOutput", "GenerateStats", "generate"]
