"""Run every CUDA and Triton kernel of the package once, on small inputs with awkward sizes: food for compute-sanitizer.

    python -m bench.tools.sanitize --processes 8
    compute-sanitizer --tool memcheck python -m bench.tools.sanitize
    compute-sanitizer --tool racecheck python -m bench.tools.sanitize

The first command lets Triton compile its kernels side by side and keep them in its cache for the others. Inputs are
made and results are checked on the CPU, so that the package's kernels are all that the sanitizer sees on the device.
Exit status 1 if a result is wrong, 2 where there is no CUDA device. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor
is an allocation of its own, and a read one element behind it is found.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from bench.common.machine import ROOT
from bench.common.workloads import tree_step
from sequoia_kernels import ops
from sequoia_kernels.drafts import TreeLayout
from sequoia_kernels.drafts.unlikely import set_back_unlikely
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.models.description import ACTIVATIONS, LAYER_NORM, RMS_NORM
from sequoia_kernels.ops import backends
from sequoia_kernels.tree import Confidence, ShapedTree, Topology

VOCAB = 1009  # prime: no block divides it
WIDE_VOCAB = 40009  # several chunks a row in every kernel
GPU_BACKENDS = ("triton", "cuda")
FUSED_STEPS = {
    "residual_norm_": "triton", "rotate_and_store_": "triton", "gated_activation": "triton", "few_rows": "cuda",
}  # fmt: skip
"""kernels of fused forwards, which are no ops, and what each is written in"""
DRAFT_STEPS = ("set_back_unlikely", "shape_levels")
"""what drafts do beside their draws, in Triton"""


class Exercise(NamedTuple):
    """One call of an op, of a kernel of the fused forwards, or of what drafts do beside their draws."""

    op: str
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    tolerance: float  # largest difference of a float output from the reference's
    swaps: int = 0  # integers that may differ: keys that are equal up to the rounding of a logarithm may change places


def exercises() -> Iterator[Exercise]:
    """Calls that between them launch every kernel, in its dtypes, layouts and branches."""
    yield from attention_exercises()
    yield from vocabulary_exercises()
    yield from verification_exercises()
    yield from compaction_exercises()
    yield from step_exercises()
    yield from few_rows_exercises()
    yield from draft_exercises()


def attention_exercises() -> Iterator[Exercise]:
    generator = torch.Generator().manual_seed(0)

    def inputs(num_nodes: int, cache_lens: list[int], dtype: torch.dtype, head_dim: int = 64) -> tuple[Any, ...]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        num_slots = max(cache_lens) + num_nodes
        caches = [normal(len(cache_lens), 2, num_slots, head_dim).transpose(1, 2) for _ in range(2)]
        mask = typical_tree(num_nodes).tensors("cpu").ancestor_mask
        lens = torch.tensor(cache_lens, dtype=torch.int32)
        return normal(len(cache_lens), num_nodes, 6, head_dim), *caches, mask, lens

    bounds = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 8e-3}
    for dtype, bound in bounds.items():
        for num_nodes, cache_lens in ((1, [300]), (13, [0, 77]), (70, [131])):
            name = f"{num_nodes} nodes behind {cache_lens}, {dtype}"
            yield Exercise("tree_attention", name, inputs(num_nodes, cache_lens, dtype), {}, bound)
    half = inputs(9, [200, 3], torch.bfloat16)
    rules = {"sliding_window": 50, "softcap": 5.0, "sinks": torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -torch.inf])}
    yield Exercise("tree_attention", "window, soft-cap, sinks and LSE", half, {**rules, "return_lse": True}, 4e-2)
    masks = torch.stack([half[3], typical_tree(9).tensors("cpu").ancestor_mask.flip(0)]).contiguous()
    yield Exercise("tree_attention", "a mask a request", (*half[:3], masks, half[4]), {}, 4e-2)
    for num_nodes, head_dim in ((5, 40), (3, 256), (200, 128)):  # the smallest and the largest tiles
        name = f"{num_nodes} nodes, head dim {head_dim}"
        yield Exercise("tree_attention", name, inputs(num_nodes, [333], torch.bfloat16, head_dim), {}, 4e-2)
    float8 = tuple(cache.to(torch.float8_e4m3fn) for cache in half[1:3])
    scales = {"k_scale": torch.tensor([0.5, 1.5]), "v_scale": 2.0}
    yield Exercise("tree_attention", "float8 cache", (half[0], *float8, *half[3:]), scales, 8e-2)
    pages, block_table = _paged([cache.contiguous() for cache in half[1:3]], page_size=16)
    options = {"block_table": block_table}
    yield Exercise("tree_attention", "paged cache", (half[0], *pages, *half[3:]), options, 4e-2)


def _paged(caches: Sequence[torch.Tensor], page_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Caches [B, S, H, D] as pages in reverse order, and their block table."""
    batch_size, num_slots = caches[0].shape[:2]
    each = -(-num_slots // page_size)
    table = torch.arange(batch_size * each - 1, -1, -1, dtype=torch.int32).reshape(batch_size, each)
    paged = []
    for cache in caches:
        rows = cache.new_zeros(batch_size, each * page_size, *cache.shape[2:])
        rows[:, :num_slots] = cache
        paged.append(rows.reshape(batch_size * each, page_size, *cache.shape[2:]).flip(0).contiguous())
    return paged, table


def vocabulary_exercises() -> Iterator[Exercise]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(5, VOCAB, generator=generator)
    logits[2, 100:900] = -torch.inf
    temperature = torch.tensor([0.0, 0.3, 0.7, 1.0, 2.0])
    top_k = torch.tensor([0, 5, 40, 1, VOCAB], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.9, 0.5, 0.99, 0.1])
    cuts = {"no warp": (None, None), "top-k": (top_k, None), "top-p": (None, top_p), "top-k and top-p": (top_k, top_p)}
    seeds, offsets = torch.arange(5), torch.arange(5) * 2**33
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = logits.to(dtype)
        for name, warps in cuts.items():
            yield Exercise("warped_logsumexp", f"{name}, {dtype}", (rounded, temperature, *warps), {}, 2e-5)
        for num_samples in (1, 7, 128):
            arguments = (rounded, num_samples, temperature, seeds, offsets)
            name = f"{num_samples} of {VOCAB}, {dtype}"
            yield Exercise("sample_without_replacement", name, arguments, {}, 2e-5, swaps=2)

    wide = (3 * torch.randn(2, WIDE_VOCAB, generator=generator)).bfloat16()
    streams = (torch.tensor([0.7, 0.0]), seeds[:2], offsets[:2])
    yield Exercise("sample_without_replacement", f"16 of {WIDE_VOCAB}", (wide, 16, *streams), {}, 2e-5, swaps=2)
    warps = (streams[0], torch.tensor([50, 0], dtype=torch.int32), torch.tensor([0.9, 0.9]))
    yield Exercise("warped_logsumexp", f"{WIDE_VOCAB} tokens", (wide, *warps), {}, 2e-5)


def verification_exercises() -> Iterator[Exercise]:
    warps = {"top_k": torch.tensor([40, 0, 3], dtype=torch.int32), "top_p": torch.tensor([0.9, 1.0, 0.8])}
    sizes = [(num_nodes, VOCAB, dtype) for num_nodes in (1, 13, 70) for dtype in (torch.float32, torch.bfloat16)]
    for num_nodes, vocab, dtype in [*sizes, (13, WIDE_VOCAB, torch.bfloat16)]:
        tree = typical_tree(num_nodes)
        step = tree_step(tree, 3, vocab, 0.7, dtype, torch.device("cpu"), seed=num_nodes)
        temperature = torch.tensor([0.7, 0.0, 0.7])
        draft_logits = step.draft_logits if num_nodes > 1 else None
        arguments = (step.tokens, step.target_logits, draft_logits, tree, temperature, step.seeds, step.offsets)
        yield Exercise("verify_tree", f"{num_nodes} nodes x {vocab}, {dtype}", arguments, {}, 0.0)
        yield Exercise("verify_tree", f"{num_nodes} nodes x {vocab}, warped, {dtype}", arguments, warps, 0.0)
        if num_nodes > 1:
            name, options = f"{num_nodes} nodes x {vocab}, traversal, {dtype}", {"rule": "traversal"}
            yield Exercise("verify_tree", name, arguments, options, 0.0)
            yield Exercise("verify_tree", f"{name}, warped", arguments, {**warps, **options}, 0.0)
            known = torch.arange(vocab - 1, 0, -2)  # what a smaller draft knows
            partial = (*arguments[:2], step.draft_logits[..., known].contiguous(), *arguments[3:])
            alone = (*arguments[:2], None, *arguments[3:])
            certain = {"certain": torch.arange(num_nodes) % 3 == 1}
            for rule in ("sequoia", "traversal"):
                name = f"{num_nodes} nodes x {vocab}, {rule}, {dtype}"
                options = {"rule": rule, "draft_to_target": known, **certain}
                yield Exercise("verify_tree", f"{name}, map and certain children", partial, options, 0.0)
                options = {"rule": rule, **certain}
                yield Exercise("verify_tree", f"{name}, certain children alone", alone, options, 0.0)


def compaction_exercises() -> Iterator[Exercise]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 50, 2, 24), (2, 50, 2, 24), (2, 50, 1, 5)]
    caches = [torch.randn(shape, generator=generator) for shape in shapes]
    caches[1] = caches[1].to(torch.bfloat16)
    paths = torch.tensor([[0, 2, 3, 7, 30], [1, 4, -1, -1, -1]], dtype=torch.int32)
    arguments = (paths, torch.tensor([5, 2], dtype=torch.int32), torch.tensor([9, 40], dtype=torch.int32))
    yield Exercise("compact_kv_cache_", "contiguous", (caches, *arguments), {}, 0.0)
    pages, block_table = _paged(caches, page_size=8)
    yield Exercise("compact_kv_cache_", "paged", (pages, *arguments), {"block_table": block_table}, 0.0)


def step_exercises() -> Iterator[Exercise]:
    """The three steps of a fused forward: every kind of norm, rotation and activation."""
    from sequoia_kernels.models.fused import steps

    generator = torch.Generator().manual_seed(3)
    bounds = {torch.float32: 2e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}

    def norm_of(kind: int, width: int, dtype: torch.dtype, offset: float = 0.0) -> steps.Norm:
        weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
        return steps.Norm(kind, weight, bias if kind == LAYER_NORM else None, 1e-5, offset)

    for dtype, bound in bounds.items():

        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        for width, kind, offset in ((96, RMS_NORM, 0.0), (1001, RMS_NORM, 1.0), (1001, LAYER_NORM, 0.0)):
            name = f"{width} wide, norm {kind} + {offset}, {dtype}"
            norm = norm_of(kind, width, dtype, offset)
            yield Exercise("residual_norm_", f"first, {name}", (normal(5, width), None, norm), {}, bound)
            options = {"update_norm": norm_of(kind, width, dtype, offset), "update_scale": 0.3}
            arguments = (normal(5, width), normal(5, width + 3)[:, :width], norm)
            yield Exercise("residual_norm_", f"with update, {name}", arguments, options, bound)
        places = steps.RowPlaces(*(torch.tensor(row).int() for row in ([3, 0, 17], [0, 1, 1, 2], [0, 1, 2, 5])), 16)
        layouts = (steps.Heads(4, 2, 16, 0, 64, 96, 16, 16), steps.Heads(3, 3, 20, 0, 60, 120, 20, 8))
        for heads, kind in zip(layouts, (RMS_NORM, None)):
            width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
            caches = [normal(3, 20, heads.num_kv_heads, heads.head_dim) for _ in range(2)]
            table = normal(18, heads.rotated_dims, dtype=torch.float32)
            norms = {}
            if kind is not None:
                norms = {f"{part}_norm": norm_of(kind, heads.head_dim, dtype) for part in ("query", "key")}
            arguments = (normal(12, width + 8)[:, :width], *caches, places, heads, table)
            yield Exercise("rotate_and_store_", f"{heads.num_heads} heads, {dtype}", arguments, norms, bound)
        for activation in range(len(ACTIVATIONS)):
            gated = activation % 2 == 0
            arguments = (normal(3, 2 * VOCAB), gated, activation)
            name = f"activation {activation}{', gated' if gated else ''}, {dtype}"
            yield Exercise("gated_activation", name, arguments, {}, bound)


def few_rows_exercises() -> Iterator[Exercise]:
    """Forwards in one launch: both types of numbers and widths of heads, one, two and four tiles of eight rows."""
    from sequoia_kernels.models.fused.few_rows import FewRowsLayer, FewRowsModel
    from sequoia_kernels.models.fused.steps import RowPlaces

    # requests, nodes, width, inner width, heads, heads of keys, their dims, vocabulary
    shapes = ((2, 3, 96, 160, 3, 3, 64, 50), (1, 9, 256, 800, 2, 2, 128, 33), (3, 7, 320, 96, 4, 1, 64, 101))
    shapes += ((1, 5, 64, 96, 2, 1, 128, 40), (1, 12, 64, 96, 2, 1, 64, 40), (2, 11, 64, 96, 2, 1, 128, 40))
    for requests, nodes, width, inner, heads, kv_heads, head_dim, vocab in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(nodes))

            def normal(
                *shape: int, scale: float = 1.0, dtype: torch.dtype = dtype, draw: Callable[..., torch.Tensor] = draw
            ) -> torch.Tensor:
                return (draw(*shape) * scale).to(dtype)

            def linear(outputs: int, width: int) -> torch.Tensor:
                return normal(outputs, width, scale=width**-0.5)

            layers = tuple(
                FewRowsLayer(
                    1 + normal(width, scale=0.1), linear((heads + 2 * kv_heads) * head_dim, width),
                    linear(width, heads * head_dim), 1 + normal(width, scale=0.1), linear(2 * inner, width),
                    linear(width, inner),
                )
                for _ in range(2)
            )  # fmt: skip
            ends = (normal(50, width), 1 + normal(width, scale=0.1), linear(vocab, width))
            model = FewRowsModel(layers, *ends, heads, kv_heads, head_dim, 1e-5, head_dim**-0.5)
            tree = typical_tree(nodes).tensors("cpu")
            ids = torch.arange(nodes, dtype=torch.int32)
            lens = torch.tensor([37, 0, 5][:requests], dtype=torch.int32)
            places = RowPlaces(lens, tree.depths.to(torch.int32), ids, 70)
            caches = [tuple(normal(requests, 37 + nodes, kv_heads, head_dim) for _ in range(2)) for _ in layers]
            tokens = torch.arange(requests * nodes).reshape(requests, nodes) * 7 % 50
            table = normal(90, head_dim, dtype=torch.float32)
            name = f"{requests} x {nodes} rows, {width} wide, heads of {head_dim}, {dtype}"
            arguments = (model, tokens, caches, places, tree.ancestor_mask, table)
            yield Exercise("few_rows", name, arguments, {}, {torch.bfloat16: 0.12, torch.float16: 0.015}[dtype])


def draft_exercises() -> Iterator[Exercise]:
    """Unlikely tokens set back, and the levels of shaped trees: chunks, requests that are left, draws that ran out."""
    generator = torch.Generator().manual_seed(4)
    temperature, top_p = torch.tensor([0.7, 0.0, 0.9]), torch.tensor([0.8, 0.8, 1.0])
    confidence = Confidence([[0.3 + 0.03 * entry for entry in range(19)]], [[0.5**rank] * 19 for rank in range(1, 5)])
    tree = ShapedTree((1, 4, 13, 21, 2), confidence)
    tokens = torch.randint(-1, VOCAB, (3, tree.num_nodes), generator=generator)
    for vocab in (VOCAB, WIDE_VOCAB):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows = [(3 * torch.randn(3, width, vocab, generator=generator)).to(dtype) for width in tree.widths[:-1]]
            yield Exercise("set_back_unlikely", f"{vocab} tokens, {dtype}", (rows[1], temperature, top_p), {}, 0.0)
            if vocab == VOCAB:
                yield Exercise("shape_levels", f"{dtype}", (tree, rows, temperature, tokens), {}, 1e-5)


# ---- running them


def moved(value: Any, device: torch.device) -> Any:
    """A deep copy of tensors in tuples, lists and dictionaries on a device; on the same device, too. Strides stay."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return copy.copy_(value)
    if isinstance(value, dict):
        return {key: moved(entry, device) for key, entry in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(moved(entry, device) for entry in value))
    return type(value)(moved(entry, device) for entry in value) if type(value) in (tuple, list) else value


def step_outputs(exercise: Exercise, backend: str, device: torch.device) -> list[torch.Tensor]:
    """`outputs` of a kernel of the fused forwards: what it returns, and what it changes."""
    from sequoia_kernels.models.fused import few_rows, reference, steps

    arguments, options = moved(exercise.arguments, device), moved(exercise.options, device)
    if backend != "reference" and exercise.op == "few_rows":
        reason = few_rows.unavailable_reason(device)
        if reason is not None:
            raise BackendUnavailableError(f"few_rows: {reason}")
        model, tokens, caches, places, mask, table = arguments
        counters = torch.zeros(2, dtype=torch.int32, device=device)
        call = few_rows.FewRowsCall.of(model, tokens, caches, places, mask, mask.shape[-2], table, counters)
        few_rows.launch(call)
        written = [call.logits]
    else:
        function = getattr(reference if backend == "reference" else steps, exercise.op)
        written = [function(*arguments, **options)]
    if exercise.op == "few_rows":
        written += [part for pair in arguments[2] for part in pair]
    else:
        changed = {"residual_norm_": arguments[:1], "rotate_and_store_": arguments[1:3], "gated_activation": ()}
        written += changed[exercise.op]
    return [tensor.cpu() for tensor in written]


def draft_outputs(exercise: Exercise, backend: str, device: torch.device) -> list[torch.Tensor]:
    """`outputs` of what drafts do beside their draws."""
    arguments = moved(exercise.arguments, device)
    if exercise.op == "set_back_unlikely":
        return [set_back_unlikely(*arguments, backend).cpu()]
    tree, rows, temperature, tokens = arguments
    layout = TreeLayout.build(tree, device, len(tokens))
    written = []
    for level, logits in zip(layout.levels, rows, strict=True):
        assert level.shape is not None
        level.shape.give_out(logits, temperature, backend)
        level.shape.note_draws(logits, temperature, tokens, backend)
        written += [level.drawn, level.step.tree_mask, level.shape.log_normaliser, level.shape.shared.reach.clone()]
    assert isinstance(layout.topology, Topology)
    return [tensor.cpu() for tensor in (*layout.topology[:-2], *written)]


def backends_of(op: str) -> tuple[str, ...]:
    """What an op can be called with by name."""
    if op in DRAFT_STEPS:
        return ("triton", "reference")
    return (FUSED_STEPS[op], "reference") if op in FUSED_STEPS else tuple(backends.backend_names(op))


def outputs(exercise: Exercise, backend: str, device: torch.device) -> list[torch.Tensor]:
    """Run one call and bring everything that it wrote to the CPU."""
    if exercise.op in FUSED_STEPS:
        return step_outputs(exercise, backend, device)
    if exercise.op in DRAFT_STEPS:
        return draft_outputs(exercise, backend, device)
    function: Callable[..., Any] = getattr(ops, exercise.op)
    arguments, options = moved(exercise.arguments, device), moved(exercise.options, device)
    result = function(*arguments, **options, backend=backend)
    if exercise.op == "compact_kv_cache_":
        result = (*arguments[0], arguments[3])
    return [tensor.cpu() for tensor in result if tensor is not None]


class Part(NamedTuple):
    """One of several equal shares of the exercises."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "0/4", the first of four."""
        part = cls(*map(int, text.split("/")))
        if not 0 <= part.index < part.count:
            raise ValueError(text)
        return part


ALL = Part(0, 1)


def run(device: torch.device, names: Sequence[str] = GPU_BACKENDS, part: Part = ALL) -> list[str]:
    """Run a part of the exercises on the named backends and return what was wrong."""
    problems = []
    for exercise in islice(exercises(), part.index, None, part.count):
        wanted = outputs(exercise, "reference", torch.device("cpu"))
        for name in names:
            if name not in backends_of(exercise.op):
                continue
            label = f"{exercise.op} on {name}: {exercise.name}"
            try:
                got = outputs(exercise, name, device)
            except BackendUnavailableError as error:
                print(f"  skipped  {label}: {error}", flush=True)
                continue
            found = [text for pair in zip(got, wanted, strict=True) if (text := _mismatch(*pair, exercise)) is not None]
            print(f"  {'WRONG' if found else 'ok':<8} {label}", flush=True)
            problems += [f"{label}: {text}" for text in found]
    return problems


def _mismatch(got: torch.Tensor, wanted: torch.Tensor, exercise: Exercise) -> str | None:
    if got.shape != wanted.shape:
        return f"shape {list(got.shape)} instead of {list(wanted.shape)}"
    if not wanted.is_floating_point():
        unequal = int((got != wanted).sum())
        return None if unequal <= exercise.swaps else f"{unequal} of {wanted.numel()} integers differ"
    if not wanted.numel():
        return None
    got, wanted = got.double(), wanted.double()
    difference = torch.where(got == wanted, 0.0, (got - wanted).abs())  # equal infinities differ by nothing
    worst = float(difference.nan_to_num(nan=float("inf")).max())
    return None if worst <= exercise.tolerance else f"off by {worst:.3g}, at most {exercise.tolerance:g} is right"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--backends", nargs="+", default=list(GPU_BACKENDS), metavar="NAME")
    parser.add_argument("--part", type=Part.parse, default=ALL, metavar="I/N", help="the I-th of N shares only")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="share the work out among N processes")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("sanitize: torch sees no CUDA device on this machine; nothing was run", file=sys.stderr)
        return 2
    if options.processes > 1:
        command = [sys.executable, "-m", "bench.tools.sanitize", "--device", options.device]
        command += ["--backends", *options.backends]
        parts = [[*command, "--part", f"{index}/{options.processes}"] for index in range(options.processes)]
        codes = [process.wait() for process in [subprocess.Popen(part, cwd=ROOT) for part in parts]]
        return 1 if any(codes) else 0
    problems = run(torch.device(options.device), options.backends, options.part)
    for problem in problems:
        print(f"WRONG {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
