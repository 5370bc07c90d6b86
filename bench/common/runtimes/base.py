"""What a runtime must offer to be compared: a pair of models in, token ids in and out."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from bench.common.runtimes import RUNTIMES
from sequoia_kernels.errors import BackendUnavailableError

PLAIN, DRAFT = "plain", "draft"  # modes: one token a step, or with the pair's draft

Tokens = list[list[int]]  # of each request


class Pair(NamedTuple):
    """Two Hugging Face model folders, whose weights are of the dtype that is compared, with one tokenizer."""

    name: str
    target: Path
    draft: Path | None  # None: only plain decoding is compared
    dtype: str

    def roles(self) -> dict[str, Path]:
        """Folders by role."""
        return {"target": self.target} | ({} if self.draft is None else {"draft": self.draft})

    def load(self, role: str, dtype: str | None = None) -> Any:
        """Load a model on the CPU, in evaluation mode, that ends at no token."""
        import torch
        from transformers import AutoModelForCausalLM

        dtype = dtype or self.dtype
        folder = self.roles()[role]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=False)
        model.generation_config.eos_token_id = None
        return model.eval()


class Request(NamedTuple):
    """What is decoded, and how."""

    prompts: Tokens  # all of one length
    num_tokens: int  # to decode for each, whatever they are
    mode: str = PLAIN
    temperature: float = 0.0
    seed: int = 0
    draft_tokens: int = 0  # that a draft proposes in a step; our own loop takes its plan instead
    calibration: Sequence[list[int]] = ()  # others of that length, to plan on; the prompts where there are none


class Runtime(ABC):
    """One runtime with one pair."""

    modules: ClassVar[dict[str, str]] = {}  # what must be importable -> the distribution that has it
    batched_draft: ClassVar[bool] = False  # decodes several requests with a draft
    tuned: ClassVar[bool] = True  # has a number of draft tokens to choose

    def __init__(self, pair: Pair, threads: int, folder: Path) -> None:
        self.pair, self.threads = pair, threads
        self.folder = folder  # for converted weights; kept from one process to the next

    @classmethod
    def missing(cls) -> str | None:
        """The reason why the runtime cannot run here, None if it can."""
        missing = sorted({package for name, package in cls.modules.items() if importlib.util.find_spec(name) is None})
        return f"not installed: {', '.join(missing)}" if missing else None

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Versions of what it is made of."""
        return {package: importlib.metadata.version(package) for package in sorted(set(cls.modules.values()))}

    def modes(self, batch_size: int) -> list[str]:
        """What it can do with so many requests."""
        with_draft = self.pair.draft is not None and (batch_size == 1 or self.batched_draft)
        return [PLAIN, DRAFT] if with_draft else [PLAIN]

    def facts(self) -> dict[str, Any]:
        """What a reader should know of how it runs."""
        return {"versions": self.versions()}

    def prepare(self, request: Request, seconds: float | None) -> dict[str, Any]:
        """Get ready for requests like this one, whose prompts are not timed; give what was chosen."""
        return {}

    @abstractmethod
    def decode(self, request: Request) -> Tokens:
        """Decode; ends of text are tokens like others."""

    def converted(self, name: str, convert: Any) -> Path:
        """The folder of a model's converted weights, made by `convert(role, folder)` for both if not there yet."""
        root = self.folder / name
        for role in self.pair.roles():
            done = root / role / "converted"
            if not done.exists():
                done.parent.mkdir(parents=True, exist_ok=True)
                convert(role, done.parent)
                done.touch()
        return root


def runtime_class(name: str) -> type[Runtime]:
    """Import the class of a runtime, or raise `BackendUnavailableError` with the reason."""
    module, attribute = RUNTIMES[name]
    found = getattr(importlib.import_module(f"bench.common.runtimes.{module}"), attribute)
    reason = found.missing()
    if reason is not None:
        raise BackendUnavailableError(f"{name}: {reason}")
    return found


def use_threads(threads: int) -> None:
    """Give this process as many processors as it may have threads, so that a runtime's own threads do not count."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def new_tokens(sequences: Sequence[Sequence[int]], prompts: Tokens) -> Tokens:
    """What stands behind the prompts."""
    return [[int(token) for token in sequence[len(prompt) :]] for sequence, prompt in zip(sequences, prompts)]
