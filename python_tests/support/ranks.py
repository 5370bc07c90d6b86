"""Start the ranks of a distributed program as processes of their own, and end them all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.eagle_heads import write_head
from support.processes import launched, python_environment
from support.tiny_families import tiny_model

PROGRAM = Path(__file__).with_name("rank_program.py")
LIMIT_SECONDS = 900.0  # ends what hangs
# Heads that four ranks can share.
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}
# Gemma's embeddings are so large that a tied head would say what it was fed.
TIED = {"gemma2": False, "tied": True}


class Rank(NamedTuple):
    """How one of them ended: its status, negative for a signal, and what it found."""

    status: int | None
    found: dict[str, Any]


def write_models(folder: Path, names: Sequence[str]) -> None:
    """Write a tiny model of each family ("tied" is a Llama) and its draft, the same with noise on the head.

    Beside a Llama two EAGLE-3 heads, "eagle" and "eagle-shared"; and "llama-short", a draft of few positions.
    """
    for name in names:
        family = "llama" if name == "tied" else name
        model = tiny_model(family, **HEADS, tie_word_embeddings=TIED.get(name, False))
        head = model.get_output_embeddings().weight
        if name == "llama":  # EAGLE-3 heads, one with an embedding and a head of its own
            write_head(folder / "eagle", model)
            write_head(folder / "eagle-shared", model, drop=("embed_tokens.weight",))
        with torch.no_grad():
            if not model.config.tie_word_embeddings:
                head.mul_(4.0)  # so that another order of sums decides nothing
            model.save_pretrained(folder / name)
            noise = 0.05 if model.config.tie_word_embeddings else 0.4  # of a tied one all layers hear
            head.add_(noise * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
            model.save_pretrained(folder / f"{name}-draft")
    short = tiny_model("llama", **HEADS, max_position_embeddings=32)
    with torch.no_grad():
        short.lm_head.weight.mul_(4.0)
    short.save_pretrained(folder / "llama-short")


def run_ranks(
    folder: Path, suite: str, num_ranks: int, *, gone: Sequence[int] = (), limit: float = LIMIT_SECONDS
) -> list[Rank]:
    """Run a suite of `rank_program.py` on some ranks, each with one thread.

    Args:
        folder: where the models lie and what they find goes.
        suite: its name.
        num_ranks: how many.
        gone: ranks that are killed or stopped on the way, which nobody waits for.
        limit: seconds after which all are killed and the test fails.
    """
    threads = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    logs = [folder / f"log of {suite}.{rank}" for rank in range(num_ranks)]
    (folder / f"store of {suite}").unlink(missing_ok=True)  # where they find one another
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(_process(folder, suite, log, {**threads, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank, log in enumerate(logs)
        ]
        waited_for = [process for rank, process in enumerate(processes) if rank not in gone]
        while any(process.poll() is None for process in waited_for) and time.monotonic() - started < limit:
            time.sleep(0.02)
    results = []
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        text = log.read_text(errors="replace")[-4000:]
        path = folder / f"{suite}.{rank}.json"
        results.append(Rank(process.returncode, json.loads(path.read_text()) if path.exists() else {}))
        if rank not in gone and process.returncode != 0:
            pytest.fail(f"rank {rank} of {num_ranks} ended with {process.returncode} in {suite}:\n{text}")
    return results


@contextlib.contextmanager
def _process(folder: Path, suite: str, log: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a rank; when the block ends it does."""
    with log.open("w") as output:
        process = subprocess.Popen(
            launched([sys.executable, PROGRAM, folder, suite]), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=python_environment(**variables), start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
