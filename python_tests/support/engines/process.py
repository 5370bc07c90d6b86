"""An engine of vLLM that a test drives: reads commands from one pipe and answers on another, a JSON document a line.

Runs in the Python that has vLLM: `python -m support.engines.process READ_FD WRITE_FD`. Engines may follow one another
in one process, all plain ones before the first with trees: the tree worker replaces the CPU's attention backend for
good.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import traceback
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from sequoia_kernels.vllm import engine_args

WORKER = "support.engines.worker.ProbedWorker"
COUNTERS = ("preemptions", "spec_decode")
BACKENDS = ("CPU_ATTN", "CUSTOM")


def sampling(values: dict[str, Any]) -> SamplingParams:
    """Read a request's parameters: greedy and to the last token where nothing else is said; `regex` is a grammar."""
    values = {"temperature": 0, "ignore_eos": True, **values}
    if "logit_bias" in values:
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    if "regex" in values:
        values["structured_outputs"] = StructuredOutputsParams(regex=values.pop("regex"))
        values["ignore_eos"] = False
    return SamplingParams(**values)


def plain_logprobs(positions: Any) -> list[dict[str, float]] | None:
    """Give the logprobs of each position by token."""
    if not positions:
        return None
    return [{str(token): entry.logprob for token, entry in position.items()} for position in positions]


class Session:
    """The commands."""

    llm: LLM | None = None

    def start(
        self,
        model: str,
        options: dict[str, Any],
        draft: str | None = None,
        worker: str = WORKER,
        changed: dict[str, Any] | None = None,
        **trees: Any,
    ) -> None:
        """Start an engine, one of trees where there is a draft; `changed` are arguments that do not fit these."""
        if draft is not None:
            options = {**options, **engine_args(draft, **trees), "worker_cls": worker}
        for name, value in (changed or {}).items():
            (options if name in options else options["speculative_config"])[name] = value
        self.llm = LLM(model, **{"enforce_eager": True, "disable_log_stats": False, "dtype": "float32", **options})

    def stop(self) -> None:
        """Stop it; the next one may start."""
        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Generate behind prompts, all at once."""
        assert self.llm is not None
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for tokens in prompts], [sampling(entry) for entry in params], use_tqdm=False
        )
        return [
            {
                "tokens": [*output.outputs[0].token_ids],
                "text": output.outputs[0].text,
                "logprobs": plain_logprobs(output.outputs[0].logprobs),
                "cached": output.num_cached_tokens,
                "finish_reason": output.outputs[0].finish_reason,
            }
            for output in outputs
        ]

    def sample(self, prompt: list[int], params: dict[str, Any], count: int) -> list[list[int]]:
        """Give the tokens behind one prompt, many times."""
        outputs = self.generate([prompt] * count, [{**params, "detokenize": False}] * count)
        return [output["tokens"] for output in outputs]

    def backends(self) -> dict[str, str | None]:
        """Give what stands for vLLM's attention backends that the plugin may replace; None for vLLM's own."""
        registry = AttentionBackendEnum
        return {kind: registry[kind].get_path() if registry[kind].is_overridden() else None for kind in BACKENDS}

    def worker(self, method: str, *arguments: Any, rank: int = 0) -> Any:
        """Call a method of all workers, and give what one of them returns."""
        assert self.llm is not None
        return self.llm.collective_rpc(method, args=arguments)[rank]

    def counters(self) -> dict[str, float]:
        """Give what vLLM counts of preemptions and of drafts."""
        assert self.llm is not None
        found = {metric.name.removeprefix("vllm:"): getattr(metric, "value", None) for metric in self.llm.get_metrics()}
        return {name: value for name, value in found.items() if any(part in name for part in COUNTERS) and value}

    def reset_prefix_cache(self) -> None:
        """Forget all blocks of prompts and texts."""
        assert self.llm is not None
        assert self.llm.reset_prefix_cache()

    def free_blocks(self) -> tuple[int, int]:
        """Give how many of vLLM's blocks are free, and how many there are but for the one that stands for none."""
        assert self.llm is not None
        core = self.llm.llm_engine.engine_core.engine_core  # of an engine in this process
        pool = core.scheduler.kv_cache_manager.block_pool
        return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1

    def arrivals(
        self,
        prompts: list[list[int]],
        params: list[dict[str, Any]],
        bad: list[dict[str, Any]],
        seed: int,
        most_running: int,
    ) -> dict[str, Any]:
        """Let requests arrive one by one while others run, abort some, and try what the engine refuses.

        Args:
            prompts: of the requests.
            params: of them; `abort_after` aborts a request when it has so many tokens.
            bad: requests that must be refused: prompt and parameters.
            seed: of the arrivals.
            most_running: requests that run or wait at most.

        Returns:
            The tokens of each request, how each ended, and the messages of what was refused.
        """
        assert self.llm is not None
        engine, rng = self.llm.llm_engine, random.Random(seed)
        tokens: dict[str, list[int]] = {}
        ended: dict[str, str | None] = {}
        refused = []
        limits = [entry.pop("abort_after", None) for entry in params]
        arrived = 0
        while arrived < len(prompts) or engine.has_unfinished_requests():
            while arrived < len(prompts) and len(tokens) - len(ended) < most_running and rng.random() < 0.7:
                name = str(arrived)
                engine.add_request(name, {"prompt_token_ids": prompts[arrived]}, sampling(params[arrived]))
                tokens[name] = []
                arrived += 1
                if bad and rng.random() < 0.1:
                    entry = bad[len(refused) % len(bad)]
                    try:
                        request = {"prompt_token_ids": entry["prompt"]}
                        engine.add_request(f"bad {len(refused)}", request, sampling(entry["params"]))
                        refused.append(None)
                    except Exception as error:
                        refused.append(str(error))
            if not engine.has_unfinished_requests():
                continue
            for output in engine.step():
                tokens[output.request_id] = [*output.outputs[0].token_ids]
                if output.finished:
                    ended[output.request_id] = output.outputs[0].finish_reason
            for name in [*tokens]:
                limit = limits[int(name)]
                if name not in ended and limit is not None and len(tokens[name]) >= limit:
                    engine.abort_request([name])
                    ended[name] = "aborted"
        engine.step()  # lets the worker hear of the last ones that ended
        return {
            "tokens": [tokens[str(index)] for index in range(len(prompts))],
            "ended": [ended[str(index)] for index in range(len(prompts))],
            "refused": refused,
        }


def main() -> None:
    """Serve commands until the pipe is closed."""
    read_fd, write_fd = map(int, sys.argv[1:3])
    os.set_inheritable(read_fd, False)
    os.set_inheritable(write_fd, False)
    session = Session()
    with open(read_fd) as commands, open(write_fd, "w") as answers:
        for line in commands:
            command = json.loads(line)
            try:
                answer = {"result": getattr(session, command.pop("do"))(*command.pop("arguments", ()), **command)}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    # What vLLM has started ends with this process; its own way of closing down takes long, and no test is of it.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
