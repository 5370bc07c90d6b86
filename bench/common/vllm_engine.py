"""One engine of vLLM in a process of its own, under loads that stay: what the process does, and who asks it.

The process is run by the interpreter of vLLM's environment; it is told everything at once, as JSON, and answers a line
of JSON a load. A load is a closed loop: so many requests are running, and when one ends the next begins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TREES = "trees"  # the key of an engine's settings that stands for `sequoia_kernels.vllm.engine_args`
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")  # vllm:spec_decode_...


class EngineFailedError(RuntimeError):
    """The process ended, or told of an error."""


# ---- a load


@dataclass
class Running:
    """A request that has been sent.

    Attributes:
        prompt: which prompt it has.
        opening: whether it is one of those that only bring the load up.
        first: when its first token came.
        last: when its latest came.
        tokens: all of them.
    """

    prompt: int
    opening: bool
    first: float = 0.0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)


def closed_loop(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    settings: Callable[[int], Any],
    *,
    concurrency: int,
    num_requests: int,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Keep so many requests running until enough of them have ended.

    The first ones are of different lengths and not counted, so that requests do not all end together. The clock starts
    when each of these has its first token, and stops with the last counted request, when the load is still there.

    Args:
        engine: an `LLMEngine`, which is empty and is left so.
        prompts: token ids of each, taken in turn.
        settings: sampling parameters for so many new tokens, of which an output holds those that are new.
        concurrency: requests that are running.
        num_requests: requests that are counted.
        new_tokens: of each of these.
        clock: gives seconds.

    Returns:
        "tokens_per_second" while the clock ran; "tpot_ms" of each counted request, the time from its first token to
        its last one over the tokens between; "texts", a hash of each counted request's tokens by its prompt.
    """
    running: dict[str, Running] = {}
    done: list[Running] = []
    sent = 0

    def send(length: int, *, opening: bool) -> None:
        nonlocal sent
        place = (len(prompts) - 1 - sent if opening else sent - concurrency) % len(prompts)
        running[str(sent)] = Running(place, opening)
        engine.add_request(str(sent), {"prompt_token_ids": list(prompts[place])}, settings(length))
        sent += 1

    for index in range(concurrency):
        send(max(1, new_tokens * (index + 1) // (concurrency + 1)), opening=True)
    waited_for = set(running)
    started, tokens = None, 0
    while len(done) < num_requests:
        outputs = engine.step()
        now = clock()
        for output in outputs:
            request = running[output.request_id]
            new = output.outputs[0].token_ids
            if new:
                waited_for.discard(output.request_id)
                request.first = request.first or now
                request.last = now
                request.tokens += new
            tokens += len(new) if started is not None else 0
            if output.finished:
                del running[output.request_id]
                if not request.opening:
                    done.append(request)
                send(new_tokens, opening=False)
        if started is None and not waited_for:
            started = now
    engine.abort_request(list(running))
    while engine.has_unfinished_requests():
        engine.step()
    assert started is not None
    counted = done[:num_requests]
    return {
        "tokens_per_second": tokens / (now - started),
        "tpot_ms": [1e3 * (one.last - one.first) / max(len(one.tokens) - 1, 1) for one in counted],
        "texts": {str(one.prompt): _hash(one.tokens) for one in counted},
    }


def sampled_tokens(
    engine: Any, prompt: Sequence[int], settings: Callable[[int], Any], *, count: int, length: int, at_once: int
) -> list[list[int]]:
    """Decode one prompt again and again.

    Args:
        engine: as for `closed_loop`.
        prompt: token ids.
        settings: as for `closed_loop`.
        count: how often.
        length: new tokens each.
        at_once: requests that are running, at most: few enough for something to be drafted.

    Returns:
        The tokens. [count, length]
    """
    texts: dict[str, list[int]] = {}

    def send() -> None:
        name = f"sampled {len(texts)}"
        texts[name] = []
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, settings(length))

    for _ in range(min(at_once, count)):
        send()
    while engine.has_unfinished_requests():
        for output in engine.step():
            texts[output.request_id] += output.outputs[0].token_ids
            if output.finished and len(texts) < count:
                send()
    return list(texts.values())


def _hash(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(json.dumps(list(tokens)).encode(), digest_size=8).hexdigest()


# ---- the process


def serve(task: Mapping[str, Any], write: Callable[[Mapping[str, Any]], None]) -> None:
    """Start an engine, warm it up, and run the loads.

    Args:
        task: "target" (folder), "settings" of the engine (`TREES` for ours), "prompts", "new_tokens", "loads" to be
            measured and "warmup" before: [temperature, concurrency, requests] each; "sampled": temperatures, and what
            `sampled_tokens` takes.
        write: takes the answers: of the start, of the warm-up, of each load; the samples by temperature.
    """
    import torch
    import transformers
    import vllm
    from vllm import EngineArgs, LLMEngine, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings = dict(task["settings"])
    if TREES in settings:
        from sequoia_kernels.vllm import engine_args

        settings |= engine_args(**settings.pop(TREES))
    began = time.perf_counter()
    engine = LLMEngine.from_engine_args(EngineArgs(model=task["target"], **settings))
    packages = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    write({"start_s": time.perf_counter() - began, "packages": packages})

    def sampling(temperature: float, length: int) -> SamplingParams:
        return SamplingParams(
            temperature=temperature, max_tokens=length, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )

    def run(load: Sequence[Any]) -> dict[str, Any]:
        temperature, concurrency, num_requests = load
        before = counters(engine)
        found = closed_loop(
            engine, task["prompts"], partial(sampling, temperature), concurrency=concurrency, num_requests=num_requests,
            new_tokens=task["new_tokens"],
        )  # fmt: skip
        found |= {name: value - before.get(name, 0) for name, value in counters(engine).items()}
        if TREES in task["settings"]:
            plan = engine.collective_rpc("tree_report")[0].get("plan", {})
            found["plan"] = plan.get("by_requests", {}).get(str(concurrency))
        return found

    began = time.perf_counter()
    for load in task["warmup"]:
        run(load)
    write({"warmup_s": time.perf_counter() - began})
    for load in task["loads"]:
        write({"load": load} | run(load))
    wanted = task["sampled"]
    options = {name: wanted[name] for name in ("count", "length", "at_once")}
    write({
        "sampled": [
            sampled_tokens(engine, wanted["prompt"], partial(sampling, temperature), **options)
            for temperature in wanted["temperatures"]
        ]
    })  # fmt: skip


def counters(engine: Any) -> dict[str, int]:
    """What vLLM counts of speculation; nothing where there is none."""
    found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in engine.get_metrics()}
    return {name: int(found[name].value) for name in COUNTERS if name in found}


def main() -> None:
    """Do the task of standard input; what libraries print goes to standard error."""
    task = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        try:
            serve(task, lambda answer: print(json.dumps(answer), file=answers))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            print(json.dumps({"error": f"{type(error).__name__}: {first}"}), file=answers)
            raise


# ---- who asks


def preloaded(python: Path, more: Sequence[Path]) -> list[Path]:
    """Libraries that vLLM wants to be loaded first on a CPU: Intel's OpenMP of its environment, and what is given."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    return [*more, *([openmp] if openmp.is_file() else [])]


def run_engine(
    python: Path,
    task: Mapping[str, Any],
    *,
    preload: Sequence[Path],
    variables: Mapping[str, str],
    log: Path,
    timeout: float,
) -> Iterator[dict[str, Any]]:
    """Run an engine's process and give its answers as they come.

    Args:
        python: the interpreter of vLLM's environment.
        task: see `serve`.
        preload: libraries to be loaded first.
        variables: environment variables beside those of this process.
        log: where what it prints goes.
        timeout: seconds that it may take.

    Raises:
        EngineFailedError: it ended early, or told of an error.
    """
    # Of the machine's own settings none may hold for one engine and not for another.
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONSAFEPATH")}
    own |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if preload:
        own["LD_PRELOAD"] = ":".join(map(str, preload))
    with log.open("w") as stream:
        process = subprocess.Popen(
            [python, "-m", "bench.common.vllm_engine"], cwd=ROOT, env=own | variables, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=stream, text=True, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    watchdog = threading.Timer(timeout, _end, [process])
    watchdog.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task))
            process.stdin.close()
        expected = 3 + len(task["loads"])
        for line in process.stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise EngineFailedError(answer["error"])
            yield answer
            expected -= 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)  # it ends its own processes
        if expected:
            lines = log.read_text(errors="replace").splitlines() or ["it said nothing"]
            raise EngineFailedError(f"ended with status {process.wait()}: {lines[-1]}")
    finally:
        watchdog.cancel()
        _end(process)
        process.wait()
        process.stdout.close()


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
