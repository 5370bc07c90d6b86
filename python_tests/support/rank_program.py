"""What every rank of the tests in `test_parallel.py` runs: `rank_program.py FOLDER SUITE`, RANK and WORLD_SIZE set.

Models lie in FOLDER; what a rank found is left there as `SUITE.RANK.json`, by the name of the scenario.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from support.shaped_trees import steep_confidence
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import sequoia_kernels.parallel as parallel
from sequoia_kernels import ShapedTree, TokenTree, adapt, generate, hf, measure_profile
from sequoia_kernels.decoding import measure_overhead, record_steps
from sequoia_kernels.drafts import LayersDraft, ModelDraft
from sequoia_kernels.models import TreeModel

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FAMILIES = ("llama", "tied", "qwen2", "qwen3", "mistral", "gemma2")
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 4, 5, 7, 10])
TREES = {"chain": TokenTree.chain(5), "tree": TREE}
ONE = torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41]])
# Three prompts of 8, 3 and 5 tokens, padded on either side.
THREE = torch.tensor([[5, 9, 11, 3, 60, 22, 8, 41], [0, 0, 0, 0, 0, 7, 2, 33], [50, 3, 3, 17, 4, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [0] * 5 + [1] * 3, [1] * 5 + [0] * 3])
BATCHES = {"one": (ONE, None), "three": (THREE, MASK)}
# Behind the prompt, which the target's first forward reads.
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": ()}
SAMPLED: dict[str, Any] = {**GREEDY, "temperature": [0.7, 1.0, 0.0], "top_p": 0.9, "seed": 11}
STEP_TIMEOUT = 300.0  # seconds that a rank waits for another

SCENARIOS: dict[str, Callable[[], Any]] = {}


def scenario(function: Callable[[], Any]) -> Callable[[], Any]:
    SCENARIOS[function.__name__] = function
    return function


def whole(name: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(Path(sys.argv[1]) / name, **options).eval()


def split(name: str, **options: Any) -> Any:
    config = DistributedConfig(tp_size=WORLD, tp_plan="auto")
    return whole(name, distributed_config=config, **options)


def texts(*arguments: Any, **settings: Any) -> list[list[int]]:
    return generate(*arguments, **settings).new_tokens


def message_of(call: Callable[[], Any]) -> str:
    """The kind and the text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@contextlib.contextmanager
def changed_logits(change: Callable[[TreeModel, torch.Tensor], None]) -> Iterator[None]:
    """Let this rank's copy of the logits of a split model's steps be others."""
    plain = TreeModel._run

    def run(self: TreeModel, inputs: Any, cache: Any) -> torch.Tensor:
        logits = plain(self, inputs, cache)
        if self.ranks is not None and inputs.last_row is None:
            logits = logits.clone()
            change(self, logits)
        return logits

    with mock.patch.object(TreeModel, "_run", run):
        yield


@contextlib.contextmanager
def counted_broadcasts() -> Iterator[list[int]]:
    sizes: list[int] = []
    plain = dist.broadcast

    def broadcast(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    with mock.patch.object(dist, "broadcast", broadcast):
        yield sizes


# What a split model says


def _greedy(family: str) -> dict[str, Any]:
    target, own, draft = split(family), whole(family), whole(f"{family}-draft")
    local = adapt(target).new_cache(1, 4).layers[0].keys.shape[2]
    found: dict[str, Any] = {"heads": local, "runs": adapt(target).runs}
    for batch, (prompts, mask) in BATCHES.items():
        expected = texts(own, None, prompts, mask, **GREEDY)
        found[batch] = {"expected": expected, "none": texts(target, None, prompts, mask, **GREEDY)}
        for name, tree in TREES.items():
            output = generate(target, draft, prompts, mask, tree=tree, **GREEDY)
            found[batch][name] = output.new_tokens
            found[batch][f"{name}, tokens a step"] = output.stats.tokens_per_step
    return found


for _family in FAMILIES:
    SCENARIOS[f"greedy {_family}"] = lambda family=_family: _greedy(family)


@scenario
def experts() -> Any:
    return {name: _greedy(name) for name in ("mixtral", "qwen3_moe")}


@scenario
def sampled() -> Any:
    target, own, draft = split("llama"), whole("llama"), whole("llama-draft")
    trees = {"one for all": TREE, "each its own": [TokenTree([-1, 0, 0, 1, 1, 2]), TokenTree([-1, 0, 0, 1, 2, 2])]}
    trees["each its own"].append(TokenTree([-1, 0, 0, 1, 1, 1]))
    trees["shaped"] = ShapedTree([1, 2, 3, 2], steep_confidence())
    found = {}
    for name, tree in trees.items():
        expected, ours = (texts(model, draft, THREE, MASK, tree=tree, **SAMPLED) for model in (own, target))
        found[name] = [expected, ours]
    return found


@scenario
def drafts() -> Any:
    target, own = split("llama"), whole("llama")
    draft, short = split("llama-draft"), split("llama-short")
    found: dict[str, Any] = {"expected": texts(own, None, THREE, MASK, **GREEDY)}
    found["split"] = texts(target, draft, THREE, MASK, tree=TREE, **GREEDY)
    found["split source"] = texts(target, ModelDraft(adapt(draft)), THREE, MASK, tree=TREE, **GREEDY)
    found["itself"] = texts(target, target, THREE, MASK, tree=TREE, **GREEDY)
    found["of a whole target"] = texts(own, draft, THREE, MASK, tree=TREE, **GREEDY)
    found["lookup"] = texts(target, "lookup", THREE, MASK, tree=TREE, **GREEDY)
    found["split, with lookup"] = texts(target, draft, THREE, MASK, lookup=True, tree=TREE, **GREEDY)
    found["rank 0's alone"] = texts(
        target, whole("llama-draft") if RANK == 0 else None, THREE, MASK, tree=TREE, **GREEDY
    )
    found["eagle"] = texts(target, f"{sys.argv[1]}/eagle", THREE, MASK, tree=TREE, **GREEDY)
    longer = {**GREEDY, "max_new_tokens": 44}
    output = generate(target, short, THREE, MASK, tree=TREE, **longer)
    found["restarts"] = [output.new_tokens == texts(own, None, THREE, MASK, **longer), output.stats.draft_restarts]
    found["changed"] = _changed_on_the_way(target, short, longer) == texts(own, None, THREE, MASK, **longer)
    sampled = [texts(model, draft, THREE, MASK, tree=TREE, **SAMPLED) for model in (own, target)]
    found["sampled"] = [sampled[0] == sampled[1], sampled[1]]
    return found


def _changed_on_the_way(target: Any, short: Any, settings: dict[str, Any]) -> list[list[int]]:
    """Decode while rank 0's streamer changes the split draft, which is then probed in the middle of the call."""
    looks: list[Any] = []
    handles: list[Any] = []

    class Changing(Streamer):
        def put(self, tokens: torch.Tensor) -> None:
            super().put(tokens)
            if len(self.tokens) >= 40 and not handles:
                handles.append(short.model.norm.register_forward_hook(lambda *_: None))

    plain = parallel.Session.look_again

    def look_again(*arguments: Any) -> Any:
        looks.append(arguments)
        return plain(*arguments)

    with mock.patch.object(parallel.Session, "look_again", look_again):
        found = texts(target, short, THREE, MASK, tree=TREE, streamer=Changing(), **settings)
    assert len(looks) == (RANK == 0)
    return found


@scenario
def split_draft() -> Any:
    target, own, draft = split("llama"), whole("llama"), split("llama-draft")
    found = {"expected": texts(own, None, THREE, MASK, **GREEDY)}
    found["split"] = texts(target, draft, THREE, MASK, tree=TREE, **GREEDY)
    return found


@scenario
def outputs() -> Any:
    """All that is asked for comes on every rank; hooks and criteria are rank 0's."""
    target, own, draft = split("llama"), whole("llama"), whole("llama-draft")
    asked: dict[str, Any] = {"return_logprobs": True, "output_logits": True, "output_scores": True}
    options: dict[str, Any] = {**GREEDY, "tree": TREE, "repetition_penalty": 1.3, **asked}
    ours, theirs = (generate(model, draft, THREE, MASK, **options) for model in (target, own))
    own_text = own.generate(ONE, max_new_tokens=16, do_sample=False, pad_token_id=0)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "custom_generate": hf.custom_generate}
    drawn = {**settings, "do_sample": True, "assistant_model": draft, "tree": TREE}
    torch.manual_seed(RANK)
    return {
        "texts": [ours.new_tokens, theirs.new_tokens],
        "reasons": ours.finish_reasons,
        "steps": ours.stats.num_steps,
        "tree": ours.stats.tree == TREE,
        "logprobs": ours.logprobs,
        "difference": max(
            float((one - other).abs().max())
            for kept in ("logits", "scores")
            for one, other in zip(getattr(ours, kept), getattr(theirs, kept), strict=True)
        ),
        "transformers": [
            target.generate(ONE, **settings, assistant_model=draft, tree=TREE).tolist(),
            own_text.tolist(),
        ],
        "unset seed": target.generate(ONE, **drawn).tolist(),
    }


class Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ends = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.ends += 1


class Letters:
    """A tokenizer that rank 0 alone has."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(40 + token) for token in tokens)


@scenario
def decisions() -> Any:
    """Ends, streams and choices: rank 0's count, whatever the others would do."""
    target, draft = split("llama"), whole("llama-draft")
    plain = texts(target, draft, ONE, tree=TREE, **GREEDY)[0]
    streamer, each = Streamer(), Streamer()
    found: dict[str, Any] = {"plain": plain}
    texts(target, draft, ONE, tree=TREE, streamer=streamer, **GREEDY)
    texts(target, draft, ONE, tree=TREE, streamer=[each], **GREEDY)
    found["streamed"] = [[entry.tokens, entry.ends] for entry in (streamer, each)]
    ends = {**GREEDY, "eos_token_id": plain[6] if RANK == 0 else ()}
    found["eos"] = texts(target, draft, ONE, tree=TREE, **ends)
    string = Letters().decode(plain[4:6])
    stops = {"stop_strings": string, "tokenizer": Letters()} if RANK == 0 else {}
    found["stop string"] = texts(target, draft, ONE, tree=TREE, **stops, **GREEDY)
    criteria = [lambda input_ids, scores: RANK > 0 or input_ids.shape[1] >= 8 + 5]
    found["criterion"] = texts(target, draft, ONE, tree=TREE, stopping_criteria=criteria, **GREEDY)
    late = generate(target, draft, ONE, tree=TREE, max_time=1e-9 if RANK == 0 else 1e9, **GREEDY)
    found["deadline"] = [late.new_tokens, late.finish_reasons]
    found["seed"] = texts(target, draft, ONE, tree=TREE, **{**SAMPLED, "temperature": 1.0, "seed": 100 + RANK})
    # Measured times differ between ranks; the plan is rank 0's.
    auto = generate(target, draft, ONE, tree="auto", **GREEDY)
    found["auto"] = [auto.new_tokens, str(auto.stats.tree), auto.stats.num_steps]
    adaptive = generate(target, draft, ONE, tree="adaptive", **GREEDY)
    found["adaptive"] = [adaptive.new_tokens, adaptive.stats.num_steps]
    measured = generate(target, f"{sys.argv[1]}/eagle", ONE, tree="auto", **GREEDY)
    found["eagle, auto"] = [measured.new_tokens, str(measured.stats.tree)]
    return found


@scenario
def measurements() -> Any:
    target, draft = split("llama"), whole("llama-draft")
    profile = measure_profile(
        target, draft, context_lens=[16], node_counts=[1, 2, 4, 8], seconds=0.2, bandwidth=False, quick=True
    )
    profile = measure_overhead(target, draft, profile, num_tokens=6, num_runs=1)
    records = record_steps(target, draft, [ONE, THREE[:1]], tree=TREE, max_new_tokens=8)
    return [repr(profile), repr(records.acceptance)]


@scenario
def broadcasts() -> Any:
    """How many there are: in steps of a small tree, and of one whose description needs more room."""
    target, draft = split("llama"), whole("llama-draft")
    found = {}
    for name, tree in {"small": TREE, "large": TokenTree([-1, *[0] * 40, *range(1, 241)])}.items():
        with counted_broadcasts() as sizes:
            output = generate(target, draft, ONE, tree=tree, **GREEDY)
        found[name] = [output.stats.num_steps, len(sizes)]
    return found


# Ranks that differ


@scenario
def differences() -> Any:
    target, draft = split("llama"), whole("llama-draft")
    settings = {"tree": TREE, **GREEDY}
    found: dict[str, Any] = {"plain": texts(target, draft, THREE, MASK, **settings)}

    def other_token(model: TreeModel, logits: torch.Tensor) -> None:
        logits[:, :, 13] = logits.amax(-1) + 1e-6 + logits.amax(-1).abs() * 2**-22  # another likeliest token, just so

    def other_bit(model: TreeModel, logits: torch.Tensor) -> None:
        logits[0, 0, 3] = torch.nextafter(logits[0, 0, 3], torch.tensor(torch.inf))

    last = RANK == WORLD - 1
    with changed_logits(other_token) if last else contextlib.nullcontext():
        found["another token"] = texts(target, draft, THREE, MASK, **settings)
        with mock.patch.dict(os.environ, {parallel.CHECK_VARIABLE: "1"}):
            found["another token, checked"] = message_of(lambda: texts(target, draft, THREE, MASK, **settings))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sequoia_kernels").addHandler(handler)
    with (
        changed_logits(other_bit) if last else contextlib.nullcontext(),
        mock.patch.dict(os.environ, {parallel.CHECK_VARIABLE: "1"}),
    ):
        found["another bit, checked"] = texts(target, draft, THREE, MASK, **settings)
    found["warnings"] = [text for text in records if "bits" in text]
    # A bit of the hidden states of one rank is a bit of what all add up: no decision may come of it on one rank alone.
    norm = target.model.layers[0].input_layernorm
    if last:
        with torch.no_grad():
            norm.weight.copy_(torch.nextafter(norm.weight, torch.tensor(torch.inf)))
    found["another bit of a weight"] = texts(target, draft, THREE, MASK, **settings)
    return found


@scenario
def other_drafts() -> Any:
    """A draft of one rank that is another one: whole, it is not asked; split, it only guesses."""
    target, draft, other = split("llama"), whole("llama-draft"), whole("llama-short")
    settings = {"tree": TREE, **GREEDY}
    found: dict[str, Any] = {"plain": texts(target, draft, THREE, MASK, **settings)}
    found["whole"] = texts(target, draft if RANK == 0 else other, THREE, MASK, **settings)
    parts = split("llama-draft")
    adapt(parts)  # which looks at its logits
    number = [0]

    def other_token(model: TreeModel, logits: torch.Tensor) -> None:
        if model.model is parts:
            number[0] += 1
            logits[:, :, 13] = 1e3

    with changed_logits(other_token) if RANK == WORLD - 1 else contextlib.nullcontext():
        found["split"] = texts(target, parts, THREE, MASK, **settings)
    found["changed"] = number[0]
    return found


@scenario
def errors() -> Any:
    """Whatever one rank finds wrong is an error on all, and the ranks can go on."""
    target, draft = split("llama"), whole("llama-draft")
    settings = {"tree": TREE, **GREEDY}
    found: dict[str, Any] = {"plain": texts(target, draft, ONE, **settings)}
    prompts = ONE + (RANK == WORLD - 1)
    found["prompts"] = message_of(lambda: texts(target, draft, prompts, **settings))

    def hook(paths: Any, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such rule")

    found["hook"] = message_of(lambda: texts(target, draft, ONE, logits_hook=hook, **settings))
    found["shared"] = message_of(lambda: texts(target, f"{sys.argv[1]}/eagle-shared", ONE, **settings))
    found["layers"] = message_of(lambda: texts(target, "layers:1", ONE, **settings))
    found["own layers"] = message_of(lambda: texts(target, LayersDraft(target, 1), ONE, **settings))
    found["compile"] = message_of(lambda: texts(target, draft, ONE, compile=True, **settings))
    found["native"] = message_of(lambda: adapt(target, forward="native"))
    with mock.patch.dict(os.environ, {parallel.CHECK_VARIABLE: "yes"}):
        found["variable"] = message_of(lambda: texts(target, draft, ONE, **settings))
    first, last = RANK == 0, RANK == WORLD - 1
    found["temperature"] = message_of(lambda: texts(target, draft, ONE, temperature=-1.0 * first, **settings))
    found["draft"] = message_of(lambda: texts(target, "/no/such/draft" if first else None, ONE, **settings))
    found["of the last"] = message_of(
        lambda: texts(target, draft, ONE, **{**settings, "max_new_tokens": -1 if last else 16})
    )
    found["transformers"] = message_of(
        lambda: target.generate(
            ONE, custom_generate=hf.custom_generate, draft=draft, rule="none" if first else "sequoia"
        )
    )
    counts = [[0] if first else [1]]
    found["profile"] = message_of(lambda: measure_profile(target, draft, context_lens=[8], node_counts=counts[0]))
    target.train(last)
    found["training"] = message_of(lambda: texts(target, draft, ONE, **settings))
    target.eval()

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise ValueError("not even that")

    def failing_hook(paths: Any, logits: torch.Tensor) -> torch.Tensor:
        raise UnprintableError

    def unprintable() -> None:
        try:
            texts(target, draft, ONE, logits_hook=failing_hook, **settings)
        except UnprintableError:
            raise KeyError("unprintable") from None

    found["unprintable"] = message_of(unprintable)
    records = message_of(lambda: record_steps(target, draft if first else None, [ONE], max_new_tokens=8))
    found["records without a draft"] = records
    parted = split("llama-draft")
    found["split draft of one rank"] = message_of(lambda: texts(target, parted if first else None, ONE, **settings))
    other = split("tied")
    found["another model"] = message_of(lambda: texts(target if first else other, None, ONE, **settings))
    call = message_of(lambda: texts(target, draft, ONE, **settings) if first else record_steps(target, draft, [ONE]))
    found["another call"] = call
    # A hook of one rank's makes that one look at its model again, with all others.
    handle = target.model.norm.register_forward_hook(lambda *_: None) if RANK == WORLD - 1 else None
    found["hook of one rank"] = texts(target, draft, ONE, **settings)
    if handle is not None:
        handle.remove()
    found["again"] = texts(target, draft, ONE, **settings)
    return found


# Ranks that end


def _until_it_ends(how: str, who: int) -> Any:
    """Decode until a rank is killed, stopped or fails in the middle of a forward; say what all make of it, twice."""
    target, draft = split("llama"), whole("llama-draft")
    seen = [0]
    plain = TreeModel._run

    def run(self: TreeModel, inputs: Any, cache: Any) -> torch.Tensor:
        if self.ranks is not None:
            seen[0] += 1
            if who == RANK and seen[0] == 8:
                if how == "fail":
                    raise torch.OutOfMemoryError("no room for the activations")
                os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return plain(self, inputs, cache)

    adapt(target), adapt(draft)
    dist.barrier()
    started = time.monotonic()
    with mock.patch.object(TreeModel, "_run", run):
        message = message_of(lambda: texts(target, draft, ONE, tree=TREE, max_new_tokens=40, eos_token_id=()))
        seconds = time.monotonic() - started
        return [message, seconds, message_of(lambda: texts(target, draft, ONE, tree=TREE))]


SUITES: dict[str, list[str]] = {
    "texts": [*(f"greedy {family}" for family in FAMILIES), "experts", "sampled", "drafts"],
    "four": [*(f"greedy {family}" for family in FAMILIES), "sampled", "split_draft", "differences"],
    "calls": ["outputs", "decisions", "measurements", "broadcasts", "differences", "other_drafts", "errors"],
}


def main() -> None:
    folder, suite = Path(sys.argv[1]), sys.argv[2]
    timeout = STEP_TIMEOUT
    found: dict[str, Any] = {}
    if suite.startswith(("kill", "stop", "fail")):
        timeout = 5.0 if suite.startswith("stop") else STEP_TIMEOUT
    store = f"file://{folder / f'store of {suite}'}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    else:
        dist.init_process_group(
            "gloo", init_method=store, rank=RANK, world_size=WORLD, timeout=datetime.timedelta(seconds=timeout)
        )
    if suite.startswith(("kill", "stop", "fail")):
        how, who = suite.split()
        found[suite] = _until_it_ends(how, int(who))
    else:
        for name in SUITES[suite]:
            started = time.monotonic()
            found[name] = SCENARIOS[name]()
            found[f"{name}, seconds"] = time.monotonic() - started
    (folder / f"{suite}.{RANK}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    # Others may be gone: no farewell that waits for them.
    os._exit(0)


if __name__ == "__main__":
    main()
