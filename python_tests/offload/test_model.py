"""Offloaded models equal their resident twins bit for bit, within their memory, and give it back."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import python_environment, run_process
from support.simulated_link import SimulatedLink, VirtualClock
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree, adapt, generate
from sequoia_kernels.models import TreeModel, TreeStep, causal_step, load_model, prefill
from sequoia_kernels.offload import (
    OffloadedModel,
    ThreadLink,
    load_offloaded,
    memory_plan,
)

LAYERS = 5
TREE = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
# what differs: biases, tied embeddings, soft-caps, windows, learned positions with an offset, a renamed head
FAMILIES = ["llama", "qwen2", "gemma2", "opt", "gpt2", "gpt_neox"]


def saved(
    folder: Path, family: str = "llama", shard: str = "20KB", dtype: torch.dtype = torch.float32, **more: Any
) -> Path:
    layers = {"n_layer": LAYERS} if family == "gpt2" else {"num_hidden_layers": LAYERS}
    if family in ("gemma2", "qwen2"):
        layers["layer_types"] = (["sliding_attention", "full_attention"] * LAYERS)[:LAYERS]  # type: ignore[assignment]
    if family == "gpt_neox":  # has no such setting, but keeps a stray one, which would spoil the reserve for the cache
        more["num_key_value_heads"] = 4
    model = tiny_model(family, **layers, **more)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def by_modules(model: Any) -> TreeModel:
    """Run a resident model as layers that stream are run, by its modules: to the same bits."""
    return adapt(model, forward="modules")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: saved(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def tree_step(tree: TokenTree) -> TreeStep:
    tensors = tree.tensors(torch.device("cpu"))
    nodes = torch.arange(tree.num_nodes, dtype=torch.int32)
    return TreeStep(tensors.ancestor_mask, nodes, tensors.depths, tree.num_nodes, 0)


def run(model: TreeModel, prompt_len: int = 10) -> list[torch.Tensor]:
    """Prefill two prompts of different lengths and score a tree behind each; return all logits and the caches."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, model.vocab_size, (2, prompt_len), generator=generator)
    lens = torch.tensor([prompt_len, prompt_len - 4], dtype=torch.int32)
    cache = model.new_cache(2, prompt_len + TREE.num_nodes)
    first = prefill(model, cache, prompts, lens)
    nodes = torch.randint(0, model.vocab_size, (2, TREE.num_nodes), generator=generator)
    return [first, model.forward(nodes, cache, lens, tree_step(TREE)), *cache.tensors()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("host_memory", ["packed", "mapped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_their_resident_twins(folders: dict[str, Path], family: str, host_memory: str) -> None:
    expected = by_modules(load_model(folders[family]))
    with load_offloaded(folders[family], host_memory=host_memory) as model:
        for name in ("num_parameters", "dtype", "vocab_size", "max_positions", "eos_token_ids", "num_layers"):
            assert getattr(model, name) == getattr(expected, name)
        assert isinstance(model, TreeModel)
        assert adapt(model) is model
        assert model.device == torch.device("cpu")
        for _ in range(2):
            assert_equal(run(model), run(expected))


@pytest.mark.parametrize("num_buffers", [1, 2, 3])
@pytest.mark.parametrize("resident_layers", range(LAYERS + 1))
def test_any_number_of_resident_layers(llama: Path, resident_layers: int, num_buffers: int) -> None:
    """Over the simulated link, which fills buffers with NaN until their copy has been waited for."""
    link = SimulatedLink(1e6, 1e-4, VirtualClock())
    with load_offloaded(llama, resident_layers=resident_layers, num_buffers=num_buffers, link=link) as model:
        assert len(model.memory.resident) == resident_layers
        assert_equal(run(model), run(by_modules(load_model(llama))))
        assert (model.streamer is None) == (resident_layers == LAYERS)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_equals_the_resident_model(llama: Path, temperature: float) -> None:
    resident = by_modules(load_model(llama))
    draft = tiny_model("llama", seed=3, num_hidden_layers=1)
    prompts = torch.tensor([[5, 9, 11, 2], [0, 0, 7, 8]])
    arguments: dict[str, Any] = {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "tree": TREE,
        "max_new_tokens": 24,
        "temperature": temperature,
        "seed": 7,
    }
    expected = generate(resident, draft, prompts, **arguments)
    with load_offloaded(llama, resident_layers=2) as model:
        output = generate(model, draft, prompts, **arguments)
        assert output.new_tokens == expected.new_tokens
        assert generate(model, None, prompts, max_new_tokens=5).new_tokens == (
            generate(resident, None, prompts, max_new_tokens=5).new_tokens
        )


def test_the_model_itself_runs_as_well(llama: Path) -> None:
    tokens = torch.tensor([[4, 5, 6]])
    with load_offloaded(llama) as model, torch.no_grad():
        assert torch.equal(model.model(tokens).logits, load_model(llama)(tokens).logits)
        assert torch.equal(
            model.model.generate(tokens, max_new_tokens=4, do_sample=False),
            load_model(llama).generate(tokens, max_new_tokens=4, do_sample=False),
        )


@pytest.mark.parametrize("host_memory", ["packed", "mapped"])
@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_dtypes(tmp_path: Path, host_memory: str, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    folder = saved(tmp_path, "gemma2", dtype=stored)
    with load_offloaded(folder, dtype=wanted, resident_layers=1, host_memory=host_memory) as model:
        assert model.dtype == (wanted or stored)
        assert_equal(run(model), run(by_modules(load_model(folder, dtype=wanted))))


def test_a_single_file_and_a_base_model_without_its_head(tmp_path: Path) -> None:
    tiny_model("gpt2", n_layer=LAYERS).transformer.save_pretrained(
        tmp_path
    )  # names lack "transformer."; the head is tied
    assert not (tmp_path / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with load_offloaded(tmp_path) as model:
        assert_equal(run(model), run(by_modules(load_model(tmp_path))))


def test_untied_embeddings_that_the_configuration_ties_are_stored_once(folders: dict[str, Path]) -> None:
    with load_offloaded(folders["gemma2"]) as model:
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


# prefill


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_a_long_prompt_takes_one_pass_over_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """StableLM finds its context on the cache, which the chunks share."""
    monkeypatch.setattr(sys.modules["sequoia_kernels.models.prefill"], "_CHUNK_ROWS", 8)
    folder = saved(tmp_path, family)
    link = SimulatedLink(1e6)
    with load_offloaded(folder, resident_layers=2, link=link) as model:
        expected = run(by_modules(load_model(folder)), prompt_len=60)
        assert model.streamer is not None
        for inference in (False, True):
            before = model.streamer.num_copies
            with torch.inference_mode(inference):
                assert_equal(run(model, prompt_len=60), expected)
            assert model.streamer.num_copies - before == 2 * len(model.memory.streamed)  # the prompt and the tree


def test_a_pass_holds_a_bounded_number_of_rows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sequoia_kernels.models.prefill"], "_CHUNK_ROWS", 8)
    monkeypatch.setattr(
        OffloadedModel.forward_chunks, "__kwdefaults__", {"max_rows": 48}
    )  # three chunks of two prompts
    with load_offloaded(llama) as model:
        expected = run(by_modules(load_model(llama)), prompt_len=60)
        assert model.streamer is not None
        before = model.streamer.num_copies
        assert_equal(run(model, prompt_len=60), expected)
        assert model.streamer.num_copies - before == (3 + 1) * LAYERS  # eight chunks in three passes, then the tree


def test_a_chunk_that_fails_ends_all_of_them(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sequoia_kernels.models.prefill"], "_CHUNK_ROWS", 8)
    with load_offloaded(llama) as model:
        expected = run(model, prompt_len=60)
        calls = 0

        def fail(module: Any, inputs: Any) -> None:
            nonlocal calls
            calls += model._lockstep.inside  # other forwards find out what the hook changes
            if calls == 3:
                raise KeyError("third layer, third chunk")

        handle = model.model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="third layer"):
            run(model, prompt_len=60)
        handle.remove()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("sequoia-chunk")]
        assert_equal(run(model, prompt_len=60), expected)


# memory


def device_bytes(model: OffloadedModel, *more: torch.Tensor) -> int:
    """Bytes of all storages that the model holds on its device, each counted once."""
    tensors = [*model.model.parameters(), *model.model.buffers(), *more]
    tensors += model.streamer.buffers if model.streamer is not None else []
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if not tensor.is_meta
    }
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_accounting_is_exact_and_within_the_budget(folders: dict[str, Path], family: str) -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "max_cache_len": 20, "max_rows": 8}
    least = memory_plan(folders[family], resident_layers=0, **arguments).total_bytes
    everything = memory_plan(folders[family], resident_layers=LAYERS, **arguments).total_bytes
    seen = set()
    for budget in range(least, everything, (everything - least) // 3):
        with load_offloaded(folders[family], device_memory_budget=budget, **arguments) as model:
            plan = memory_plan(folders[family], device_memory_budget=budget, **arguments)
            assert model.memory == plan
            cache = model.new_cache(2, 20)
            during: list[int] = []
            for layer in model.model.modules():
                if type(layer).__name__.endswith(("DecoderLayer", "Block", "NeoXLayer")):
                    layer.register_forward_hook(lambda *_: during.append(device_bytes(model, *cache.tensors())))  # noqa: B023
            model.forward(
                torch.tensor([[1], [2]]), cache, torch.zeros(2, dtype=torch.int32), tree_step(TokenTree.single())
            )
            assert len(during) == LAYERS
            assert set(during) == {plan.weight_bytes + plan.kv_bytes}
            assert plan.total_bytes <= budget
            seen.add(len(plan.resident))
    assert len(seen) > 1


def test_a_cache_beyond_the_budget_is_refused(llama: Path) -> None:
    budget = memory_plan(llama, resident_layers=0, max_cache_len=20, max_rows=8).total_bytes
    with load_offloaded(llama, device_memory_budget=budget, max_cache_len=20, max_rows=8) as model:
        assert model.new_cache(1, 20).max_cache_len == 20
        with pytest.raises(ValueError, match="new_cache: batch_size x max_cache_len = 1 x 21 must fit the"):
            model.new_cache(1, 21)
        with pytest.raises(ValueError, match="must be at least 1"):
            model.new_cache(0, 21)
        assert model.new_paged_cache(5, 4).num_bytes == model.memory.kv_bytes
        with pytest.raises(ValueError, match="new_paged_cache: num_pages x page_size = 3 x 7 must fit the"):
            model.new_paged_cache(3, 7)
        with pytest.raises(ValueError, match="PagedTreeCache: page_size must be at least 1, got 0"):
            model.new_paged_cache(3, 0)


def test_a_pass_over_the_weights_fills_pages(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that go through the layers side by side store their rows in pages of the same pool."""
    monkeypatch.setattr(sys.modules["sequoia_kernels.models.prefill"], "_CHUNK_ROWS", 8)
    prompts = torch.arange(60).view(2, 30) % 32
    lens, step = torch.tensor([30, 17], dtype=torch.int32), causal_step(5)
    table = torch.tensor([[9, 2, 4, 0, 11], [5, 7, 3, 8, 1]], dtype=torch.int32)
    with load_offloaded(llama) as model:
        scored = []
        for cache in (model.new_cache(2, 40), model.new_paged_cache(12, 8).of(table)):
            last = prefill(model, cache, prompts, lens)
            scored.append((last, model.forward(prompts[:, :5], cache, lens, step)))
        assert model.streamer is not None
        for one, other in zip(*scored, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


_PEAK_SCRIPT = """
import json, sys, threading
import torch
from sequoia_kernels.models import prefill
from sequoia_kernels.offload import load_offloaded

def anonymous():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("RssAnon", "RssShmem")))

def watch():
    while not stop.wait(0.001):
        peak.append(anonymous())

def run(model, rows):
    prefill(model, model.new_cache(1, rows), torch.ones(1, rows, dtype=torch.int64), torch.tensor([rows]))

warm, folder, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
with load_offloaded(warm) as model:
    run(model, 40)
found = {}
for host_memory in ("mapped", "packed"):
    start, peak, stop = anonymous(), [0], threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)  # must not keep a failed script alive
    watcher.start()
    with load_offloaded(folder, host_memory=host_memory, resident_layers=2, max_cache_len=rows, max_rows=1) as model:
        loaded = max(peak) - start
        for _ in range(3):
            run(model, rows)
        found[host_memory] = [model.memory.total_bytes, model.memory.weight_bytes, model.memory.streamed_bytes]
    stop.set()
    watcher.join()
    del model
    found[host_memory] += [loaded, max(peak) - start, anonymous() - start]
sys.stdout.write(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory use from /proc")
@pytest.mark.parametrize(("rows", "hidden"), [(32, 256), (2048, 128)])
def test_peak_memory_of_the_process(llama: Path, tmp_path: Path, rows: int, hidden: int) -> None:
    """Never the whole model on the device, never twice on the host, a prompt within its reserve, all of it given back.

    Short prompts: weights are all there is. Long ones, in four chunks: keys, values and activations are most of it.
    """
    shapes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 2048}
    folder = saved(tmp_path, shard="20MB", max_position_embeddings=rows, **shapes)
    # What the C library and MKL keep for themselves is no part of the accounting.
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "MKL_DISABLE_FAST_MM": "1"}
    result = run_process(
        [sys.executable, "-c", _PEAK_SCRIPT, llama, folder, str(rows)],
        env=python_environment(**quiet, OMP_NUM_THREADS="1"),
    )
    slack = 5 << 20  # Python objects; less than two of the large layers
    for host_memory, (total, weights, streamed, loaded, peak, left) in json.loads(result.stdout).items():
        on_host = streamed if host_memory == "packed" else 0
        assert loaded <= weights + on_host + slack, host_memory
        assert peak <= total + on_host + slack, host_memory
        assert left <= slack, host_memory
        if hidden == 256:
            assert streamed > 11 << 20
        else:  # the reserve is needed, and not many times too large
            assert peak > 0.4 * (total + on_host), host_memory


# closing


def test_closing_frees_the_host_memory_and_ends_the_thread(llama: Path) -> None:
    model = load_offloaded(llama)
    assert model.streamer is not None
    link = model.streamer.link
    assert isinstance(link, ThreadLink)
    blocks = [weakref.ref(source) for source in model.streamer.sources]
    model.close()
    model.close()
    gc.collect()
    assert not link._worker.is_alive
    assert [block() for block in blocks] == [None] * LAYERS
    with pytest.raises(RuntimeError, match="the model must be open, got a closed one"):
        run(model)


def test_copies_are_refused(llama: Path) -> None:
    with load_offloaded(llama, resident_layers=1) as model:
        for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(TypeError, match="OffloadedModel: the model must be loaded again"):
                attempt(model)


def test_dropping_the_model_closes_it(llama: Path) -> None:
    model = load_offloaded(llama)
    assert model.streamer is not None
    link = model.streamer.link
    del model
    gc.collect()
    assert not link._worker.is_alive  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_forward_can_be_repeated(llama: Path, error: type[BaseException]) -> None:
    with load_offloaded(llama, resident_layers=1) as model:
        expected = run(model)

        def interrupt(module: Any, inputs: Any) -> None:
            raise error

        handle = model.model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            run(model)
        handle.remove()
        assert_equal(run(model), expected)


def test_interrupting_generation_in_a_with_statement_frees_everything(llama: Path) -> None:
    class Streamer:
        def put(self, tokens: torch.Tensor) -> None:
            if tokens.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(KeyboardInterrupt), load_offloaded(llama) as model:
        generate(model, None, prompt, max_new_tokens=8, streamer=Streamer())
    assert model.streamer is not None
    assert model.streamer.sources == []
    assert not model.streamer.link._worker.is_alive  # type: ignore[attr-defined]


def test_memory_is_freed_even_if_the_link_fails(llama: Path) -> None:
    class BrokenLink(SimulatedLink):
        def close(self) -> None:
            raise RuntimeError("the device is lost")

    model = load_offloaded(llama, link=BrokenLink(1e6))
    assert model.streamer is not None
    blocks = [weakref.ref(source) for source in model.streamer.sources]
    with pytest.raises(RuntimeError, match="the device is lost"):
        model.close()
    gc.collect()
    assert [block() for block in blocks] == [None] * LAYERS
    model.close()


_INTERRUPT_SCRIPT = """
import os, signal, sys, threading
import torch
from sequoia_kernels import generate
from sequoia_kernels.offload import ThreadLink, model as module

# a process started in the background may have inherited that the signal is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
locked = set()

class Lock:
    def lock(self, block):
        locked.add(block.data_ptr())
    def unlock(self, block):
        locked.remove(block.data_ptr())

module._page_lock = lambda device: Lock()
folder, stage = sys.argv[1:]
prompt = torch.ones(1, 2000 if stage == "prefill" else 3, dtype=torch.int64)
with module.load_offloaded(folder, link=ThreadLink(latency_s=0.0)) as model:
    assert len(locked) == 5
    model.streamer.link._latency = 1.0  # from now on a copy takes a second
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        generate(model, None, prompt, max_new_tokens=50)
    except KeyboardInterrupt:
        model.close()
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("sequoia")]
        sys.stdout.write(f"{len(locked)} locked, threads {threads}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_ctrl_c_ends_a_run_that_waits_for_a_copy_and_unlocks_the_memory(tmp_path: Path, stage: str) -> None:
    folder = saved(tmp_path, max_position_embeddings=4096)
    result = run_process(
        [sys.executable, "-c", _INTERRUPT_SCRIPT, folder, stage], env=python_environment(OMP_NUM_THREADS="1")
    )
    assert result.stdout == "0 locked, threads []"


def test_repr(llama: Path) -> None:
    with load_offloaded(llama, resident_layers=2) as model:
        assert repr(model).endswith("3 of 5 layers streamed)")
