"""verify_tree against the child-by-child loop on probabilities, and the tree kernels of sgl-kernel.

GPU cases have the vocabulary of Llama-3, logits in bfloat16, trees that are optimal for a typical acceptance vector. A
case decides by the rule "sequoia" unless its name says "traversal", which the rivals do not know.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

from bench.common.baselines import verify_child_by_child
from bench.common.harness import Case, Provider, Unavailable, main, own_providers
from bench.common.workloads import VOCAB, TreeStepInputs, internal_nodes, tree_step
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.ops import VerifiedPath, verify_tree
from sequoia_kernels.rng import RESIDUAL_TAG, node_coins, token_gumbel

OP = "verify_tree"
SEQUOIA, TRAVERSAL = "sequoia", "traversal"


def _case(
    device: str,
    num_nodes: int,
    vocab: int,
    quick: bool,
    dtype: str,
    temperature: float = 0.6,
    batch_size: int = 1,
    rule: str = SEQUOIA,
) -> Case:
    greedy = ", greedy" if temperature == 0 else ""
    batch = f"{batch_size} x " if batch_size > 1 else ""
    by_rule = "" if rule == SEQUOIA else f", {rule}"
    name = f"{batch}{num_nodes} nodes x {vocab}{greedy}{by_rule}"
    sizes = {"batch_size": batch_size, "num_nodes": num_nodes, "vocab": vocab, "dtype": dtype}
    return Case(name, device, {**sizes, "temperature": temperature, "rule": rule}, quick)


CASES = [
    _case("cpu", 8, 64, True, "float32"),
    _case("cpu", 16, 32000, True, "float32"),
    _case("cpu", 16, 32000, True, "float32", temperature=0.0),
    _case("cpu", 64, VOCAB, False, "bfloat16"),
    _case("cpu", 16, 32000, False, "float32", batch_size=8),
    *(
        _case("cpu", num_nodes, vocab, vocab == 512 and num_nodes == 8, "float32", rule=rule)
        for num_nodes in (8, 16, 64, 128)
        for vocab in (512, 49152, 151936)
        for rule in (SEQUOIA, TRAVERSAL)
    ),
    _case("cuda", 64, VOCAB, True, "bfloat16"),
    _case("cuda", 128, VOCAB, True, "bfloat16"),
    _case("cuda", 64, VOCAB, True, "bfloat16", temperature=0.0),
    _case("cuda", 16, VOCAB, False, "bfloat16"),
    _case("cuda", 256, VOCAB, False, "bfloat16"),
    _case("cuda", 512, VOCAB, False, "bfloat16"),
    _case("cuda", 64, 32000, False, "bfloat16"),
    _case("cuda", 32, VOCAB, False, "bfloat16", batch_size=8),
    _case("cuda", 128, VOCAB, False, "bfloat16", temperature=0.0),
    _case("cuda", 64, VOCAB, False, "bfloat16", rule=TRAVERSAL),
    _case("cuda", 128, VOCAB, False, "bfloat16", rule=TRAVERSAL),
]


def make_inputs(case: Case, device: torch.device, seed: int) -> TreeStepInputs:
    dtype = getattr(torch, case["dtype"])
    tree = typical_tree(case["num_nodes"])
    return tree_step(tree, case["batch_size"], case["vocab"], case["temperature"], dtype, device, seed)


def bytes_moved(case: Case) -> int:
    """The rows of logits that a call must look at, each once, whatever it comes to.

    On a CPU values are checked: the target's rows of all nodes and the draft's of those with children, at every
    temperature and by every rule. What a rule then reads again of the nodes that it visits is not counted.

    On a GPU nothing is checked. By the rule "sequoia": the target's rows of all nodes, since a device decides at all of
    them at once, and, where sampled, the draft's of those with children. By "traversal": both rows of the nodes with
    children, all of which it may enter, and the target's row of one leaf.
    """
    tree = typical_tree(case["num_nodes"])
    num_internal = len(internal_nodes(tree))
    draft_rows = num_internal if case["temperature"] > 0 or case.device == "cpu" else 0
    is_traversal = _rule(case) == TRAVERSAL and case["temperature"] > 0 and case.device != "cpu"
    target_rows = num_internal + 1 if is_traversal else tree.num_nodes
    rows = case["batch_size"] * (target_rows + draft_rows)
    return rows * case["vocab"] * getattr(torch, case["dtype"]).itemsize


def expected(case: Case, inputs: TreeStepInputs) -> VerifiedPath:
    """The reference's decisions in float64, with the coins and the noise that the op defines."""
    doubles = inputs._replace(target_logits=inputs.target_logits.double(), draft_logits=inputs.draft_logits.double())
    return _own(case, doubles, "reference")()


def mismatch(case: Case, inputs: TreeStepInputs, expected: VerifiedPath, result: VerifiedPath) -> str | None:
    for name, got, wanted in zip(VerifiedPath._fields, result, expected):
        if got.shape != wanted.shape:
            return f"{name} has shape {list(got.shape)} instead of {list(wanted.shape)}"
        if not torch.equal(got.long(), wanted.long()):
            return f"{name} is {got.tolist()} instead of {wanted.tolist()}"
    return None


def _rule(case: Case) -> str:
    return str(case.sizes.get("rule", SEQUOIA))


def _own(case: Case, inputs: TreeStepInputs, backend: str) -> Any:
    arguments, rule = (*inputs[:3], typical_tree(case["num_nodes"]), *inputs[3:]), _rule(case)
    return lambda: verify_tree(*arguments, rule=rule, backend=backend)


def _refuse_traversal(case: Case) -> None:
    if _rule(case) == TRAVERSAL:
        raise Unavailable('decides from the root, child by child: it does not know the rule "traversal"')


def _loop_arguments(case: Case, inputs: TreeStepInputs) -> tuple[Any, ...]:
    return (*inputs[:3], typical_tree(case["num_nodes"]), case["temperature"])


def _loop(case: Case, inputs: TreeStepInputs) -> Any:
    _refuse_traversal(case)
    arguments = _loop_arguments(case, inputs)
    return lambda: verify_child_by_child(*arguments)


def _loop_with_given_noise(case: Case, inputs: TreeStepInputs) -> VerifiedPath:
    streams = (inputs.seeds, inputs.offsets)
    uniforms = node_coins(*streams, case["num_nodes"])
    race = torch.exp(-token_gumbel(*streams, case["vocab"], RESIDUAL_TAG))
    return verify_child_by_child(*_loop_arguments(case, inputs), uniforms=uniforms, race=race)


def _sgl_kernel() -> Any:
    try:
        import sgl_kernel
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"sgl_kernel cannot be imported: {error}") from None
    return sgl_kernel


class _LinkedTree:
    """A tree and output buffers in the form that sgl-kernel takes: first child and next sibling of each node."""

    def __init__(self, case: Case, device: torch.device) -> None:
        tree, batch_size = typical_tree(case["num_nodes"]), case["batch_size"]
        siblings = [-1] * tree.num_nodes
        for node in internal_nodes(tree):
            children = tree.children(node)
            for child, following in itertools.pairwise(children):
                siblings[child] = following
        shape = (batch_size, tree.num_nodes)
        self.index = torch.arange(batch_size * tree.num_nodes, device=device).reshape(shape)
        self.first_child = torch.tensor(tree.first_child, device=device).repeat(batch_size, 1)
        self.next_sibling = torch.tensor(siblings, device=device).repeat(batch_size, 1)
        self.predicts = torch.full((batch_size * tree.num_nodes,), -1, dtype=torch.int32, device=device)
        self.accepted = torch.full((batch_size, tree.num_levels), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def path(self) -> VerifiedPath:
        """What the buffers say, in this package's terms: their counts leave the root out."""
        requests = torch.arange(len(self.counts), device=self.counts.device)
        num_accepted = self.counts + 1
        levels = torch.arange(self.accepted.shape[1], device=self.counts.device)
        nodes = torch.where(levels < num_accepted[:, None], self.accepted - self.index[:, :1], -1)
        last = self.accepted[requests, self.counts.long()].long()
        return VerifiedPath(nodes.int(), num_accepted, self.predicts[last].long())


def _sgl(case: Case, inputs: TreeStepInputs) -> Any:
    _refuse_traversal(case)
    if case.device != "cuda":
        raise Unavailable("needs a CUDA device")
    kernels = _sgl_kernel()
    linked = _LinkedTree(case, inputs.tokens.device)
    links = (linked.index, linked.first_child, linked.next_sibling)
    outputs = (linked.predicts, linked.accepted, linked.counts)
    temperature = case["temperature"]

    def greedy() -> VerifiedPath:
        best = inputs.target_logits.argmax(dim=-1)
        kernels.verify_tree_greedy(*outputs, inputs.tokens, *links, best)
        return linked.path()

    def sampled() -> VerifiedPath:
        target_probs = torch.softmax(inputs.target_logits.float() / temperature, dim=-1)
        coins = torch.rand(inputs.tokens.shape, device=inputs.tokens.device)
        final_coins = torch.rand(len(inputs.tokens), device=inputs.tokens.device)
        kernels.tree_speculative_sampling_target_only(
            *outputs, inputs.tokens, *links, coins, final_coins, target_probs, torch.zeros_like(target_probs)
        )
        return linked.path()

    return greedy if temperature == 0 else sampled


def _sgl_mismatch(case: Case, inputs: TreeStepInputs, expected: VerifiedPath, result: VerifiedPath) -> str | None:
    """Greedy decisions must be equal. Sampled ones follow another rule: there, that the path is one of the tree."""
    if case["temperature"] == 0:
        return mismatch(case, inputs, expected, result)
    parents = typical_tree(case["num_nodes"]).parents
    for nodes, count, token in zip(result.nodes.tolist(), result.num_accepted.tolist(), result.next_token.tolist()):
        path = nodes[:count]
        if path[0] != 0 or any(parents[child] != parent for parent, child in itertools.pairwise(path)):
            return f"{path} is no path of the tree"
        if not 0 <= token < case["vocab"]:
            return f"next token {token} is outside the vocabulary"
    return None


PROVIDERS = {
    **own_providers(OP, _own),
    "child by child": Provider(
        _loop,
        capturable=False,
        gate=_loop_with_given_noise,
        note="probabilities of all nodes, then a loop on the host that waits for every decision",
    ),
    "sgl-kernel": Provider(
        _sgl,
        mismatch=_sgl_mismatch,
        note="softmax (greedy: argmax) and its tree kernel; sampled, it looks at the target only, which accepts less",
    ),
}


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
