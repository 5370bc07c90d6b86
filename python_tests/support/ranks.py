"""Start the ranks of a distributed program as processes of their own, and end them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.processes import python_environment
from support.tiny_families import tiny_model

PROGRAM = Path(__file__).with_name("rank_program.py")
LIMIT_SECONDS = 300.0  # ends what hangs
# Heads that four ranks can share.
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}


class Rank(NamedTuple):
    """How one of them ended: its status, negative for a signal; what it wrote; what it found."""

    status: int | None
    errors: str
    found: dict[str, Any]
    seconds: float


def write_models(folder: Path, families: Sequence[str]) -> None:
    """Write a tiny model of each family, and drafts: each with noise on its head, and one of few positions."""
    for family in families:
        # Logits that are far from uniform, so that another order of sums decides nothing.
        model = tiny_model(family, **HEADS)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4.0)
        model.save_pretrained(folder / family)
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            generator = torch.Generator().manual_seed(1)
            weight.add_(0.4 * weight.std() * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder / f"{family}-draft")
    short = tiny_model("llama", seed=0, **HEADS, max_position_embeddings=32)
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
    threads = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(num_ranks), "HF_HUB_OFFLINE": "1"}
    logs = [open(folder / f"log of {suite}.{rank}", "w+") for rank in range(num_ranks)]
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), suite], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=python_environment(**threads, RANK=str(rank), LOCAL_RANK=str(rank)), start_new_session=True,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    ends: dict[int, float] = {}
    try:
        waited_for = [rank for rank in range(num_ranks) if rank not in gone]
        while len(ends) < len(waited_for) and time.monotonic() - started < limit:
            for rank in waited_for:
                if rank not in ends and processes[rank].poll() is not None:
                    ends[rank] = time.monotonic() - started
            time.sleep(0.02)
        # Where one has failed, the others' wait is over soon; how it ended is in its log.
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = []
    for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
        log.seek(0)
        text = log.read()[-4000:]
        log.close()
        path = folder / f"{suite}.{rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        results.append(Rank(process.returncode, text, found, ends.get(rank, limit)))
        if rank not in gone and process.returncode != 0:
            pytest.fail(f"rank {rank} of {num_ranks} ended with {process.returncode} in {suite}:\n{text}")
    return results
