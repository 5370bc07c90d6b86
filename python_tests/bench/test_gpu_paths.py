"""What the benchmarks do on a GPU, as far as it can be checked without one: with a stand-in for the device's clock and
for the packages that are compared with. The kernels and times of a device are not tested here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.bench_scripts import bench_script, clocks, harness, report

from sequoia_kernels.measure.calls import typical_tree
from sequoia_kernels.ops import verify_tree

CPU = torch.device("cpu")


# The clock


@pytest.fixture
def clock(fake_cuda, monkeypatch):
    """A clock of a device whose tensors lie on the CPU; its fake is `clock.fake`."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=256))
    clock = clocks.DeviceClock(CPU)
    clock.fake = fake_cuda
    clock.replace_l2 = lambda: fake_cuda.log.append("replace L2")
    return clock


def counted(fake, name):
    return lambda: fake.launch(None, lambda: fake.log.append(name))


def test_a_graph_runs_once_over_every_input_set(clock):
    log = clock.fake.log
    calls = [counted(clock.fake, name) for name in ("first", "second")]
    samplers, reason = clock.samplers(calls, lambda: log.append("reset"))
    assert reason is None and tuple(samplers) == clocks.MODES["cuda"]
    seen = {}
    for mode, sample in samplers.items():
        log.clear()
        assert sample() == (2.0 if "graph" in mode else 4.0)  # a replay is two calls
        seen[mode] = [line for line in log if "default" not in line]
    assert seen == {
        "graph_cold": ["reset", "replace L2", "first", "second"],
        "graph_warm": ["reset", "busy", "first", "first"],
        "eager_cold": ["reset", "replace L2", "first"],
        "eager_warm": ["reset", "busy", "first"],
    }
    clock.fake.assert_untouched()


def test_what_changes_its_inputs_is_captured_on_fresh_ones(clock):
    """Both runs before the capture begin behind a reset, as the timed ones do."""
    log = clock.fake.log
    clock.samplers([counted(clock.fake, "call")], lambda: log.append("reset"))
    runs = " ".join(line for line in log if line in ("call", "reset"))
    assert "call call" not in runs and runs.count("call") == 5  # once to see how long it takes, twice for each graph


def test_what_cannot_be_captured_is_timed_uncaptured(clock, monkeypatch):
    log = clock.fake.log

    def waits():
        clock.fake.wait()

    samplers, reason = clock.samplers([waits], lambda: None)
    assert reason.startswith("cannot be captured: it waits for the device at ")
    assert list(samplers) == ["eager_cold", "eager_warm"]
    clock.fake.assert_untouched()
    log.clear()
    samplers, reason = clock.samplers([waits], lambda: None, capturable=False)
    assert reason == "works on the host between launches" and not any("capture" in line for line in log)
    assert list(samplers) == ["eager_cold", "eager_warm"]
    monkeypatch.setattr(torch.cuda.Event, "milliseconds", 6.0)
    samplers, reason = clock.samplers([counted(clock.fake, "long")], lambda: None)
    assert reason.startswith("takes more than 5 ms") and not any("capture" in line for line in log)


def test_the_clock_works_on_its_own_device(clock):
    """Which need not be the current one: events and the kernel that keeps the device busy go to its stream."""
    clock.device = torch.device("cuda", 1)
    clock.fake.log.clear()
    clock.samplers([counted(clock.fake, "call")], lambda: None, capturable=False)[0]["eager_warm"]()
    recorded = "record on default of cuda:1"
    assert clock.fake.log == ["busy", recorded, "call", recorded, "wait for default of cuda:1"]


def test_a_gpu_document_and_its_table(fake_cuda, clock, monkeypatch, tmp_path):
    def add(case, x):
        return lambda: (fake_cuda.launch(None, lambda: None), x + 1)[1]

    bench = SimpleNamespace(
        OP="verify_tree",
        CASES=[harness.Case("one", "cuda", {"size": 4}), harness.Case("other device", "cpu", {"size": 4})],
        PROVIDERS={
            "sequoia triton": harness.Provider(add, ours=True),
            "loop": harness.Provider(add, capturable=False, note="a loop"),
        },
        make_inputs=lambda case, device, seed: torch.zeros(case["size"]),
        expected=lambda case, inputs: inputs + 1,
        mismatch=lambda case, inputs, expected, result: None if torch.equal(expected, result) else "wrong",
        bytes_moved=lambda case: 32,
        flops=lambda case: 0,
    )
    peaks = {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 700.0, "matmul_dtype": "bfloat16"}
    environment = harness.environment("cpu")
    monkeypatch.setattr(harness, "measure_peaks", lambda device, seconds: peaks)
    monkeypatch.setattr(harness, "environment", lambda device: environment)
    monkeypatch.setattr(harness, "count_launches", lambda call: 3)
    monkeypatch.setattr(harness, "DeviceClock", lambda device: clocks.DeviceClock(CPU))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 5 * 16, 1 << 20))
    settings = harness.Settings(torch.device("cuda"), seconds_per_case=0.01, min_repeats=2)
    document = harness.run_bench(bench, settings)
    (case,) = document["cases"]
    assert case["input_sets"] == 5  # what fits into a quarter of the free memory
    ours, loop = case["providers"]["sequoia triton"], case["providers"]["loop"]
    assert ours["captured"] and ours["launches"] == 3 and ours["headline"] == "graph_cold"
    assert ours["ms"]["graph_cold"]["p50"] == 4.0 / 5 and set(ours["ms"]) == set(clocks.MODES["cuda"])
    assert not loop["captured"] and loop["headline"] == "eager_cold"
    assert case["ratios"]["sequoia triton"] == {"loop": 1.0}  # uncaptured against uncaptured
    text = report.markdown(document)
    assert "| one | **sequoia triton** | 800 us" in text
    assert "- loop (one): uncaptured: works on the host between launches" in text
    assert report.plot(document, tmp_path / "plot.png") in (None, "matplotlib is not installed")


# Others' packages: that they are called as their documentation says, and that results are read right


def cuda_case(case):
    return harness.Case(case.name, "cuda", case.sizes)


@pytest.fixture
def attention():
    bench = bench_script("tree_attention")
    small = next(case for case in bench.CASES if case.device == "cpu")
    case = cuda_case(small)
    inputs = bench.make_inputs(case, CPU, 0)
    return bench, case, inputs, bench.expected(case, inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_trees_mask(attention, monkeypatch):
    bench, case, inputs, expected = attention
    compiled = torch.compile  # which FlexAttention itself uses, too, with options of its own
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: function if "dynamic" in options else compiled(function, **options),
    )
    monkeypatch.setattr(bench, "FLEX_CASES", {(case["context_len"], case["num_nodes"])})
    monkeypatch.setattr(bench, "_flex_parts", {})
    result = bench.PROVIDERS["FlexAttention"].prepare(case, inputs)()
    assert bench.mismatch(case, inputs, expected, result) is None


class FakeFlashInfer:
    """BatchPrefillWithPagedKVCacheWrapper by its documentation, in plain torch."""

    def __init__(self, workspace, kv_layout, backend):
        assert workspace.dtype == torch.uint8 and (kv_layout, backend) == ("NHD", "fa2")

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, custom_mask, q_data_type, kv_data_type,
    ):  # fmt: skip
        for values in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert values.dtype == torch.int32
        assert custom_mask.dtype == torch.bool
        self.plan_of = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self.page_size, self.mask = page_size, custom_mask
        self.shapes = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q, caches):
        assert q.dtype == self.dtypes[0] and caches[0].dtype == self.dtypes[1]
        assert (q.shape[1], caches[0].shape[2], q.shape[2]) == self.shapes
        qo, kv, indices, last = (values.tolist() for values in self.plan_of)
        out, start = [], 0
        for request in range(len(qo) - 1):
            rows = q[qo[request] : qo[request + 1]]
            length = (kv[request + 1] - kv[request] - 1) * self.page_size + last[request]
            keys, values = (
                cache[indices[kv[request] : kv[request + 1]]].flatten(0, 1)[:length].transpose(0, 1) for cache in caches
            )
            mask = self.mask[start : start + len(rows) * length].reshape(len(rows), length)
            start += len(rows) * length
            attended = F.scaled_dot_product_attention(
                rows.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1))
        assert start == len(self.mask)
        return torch.cat(out)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_flashinfer_gets_the_pages_and_the_mask(attention, monkeypatch, batch_size):
    bench, case, _, _ = attention
    case = harness.Case("paged", "cuda", {**case.sizes, "batch_size": batch_size})
    inputs = bench.make_inputs(case, CPU, 1)
    fake = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=FakeFlashInfer)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    result = bench.PROVIDERS["FlashInfer"].prepare(case, inputs)()
    assert bench.mismatch(case, inputs, bench.expected(case, inputs), result) is None


@pytest.mark.parametrize(
    ("op", "name", "module"),
    [("tree_attention", "FlashInfer", "flashinfer"), ("verify_tree", "sgl-kernel", "sgl_kernel")],
)
def test_an_absent_package_is_named(op, name, module, monkeypatch):
    bench = bench_script(op)
    monkeypatch.setitem(sys.modules, module, None)
    case = cuda_case(next(case for case in bench.CASES if case.device == "cpu"))
    with pytest.raises(harness.Unavailable, match=f"{module} cannot be imported"):
        bench.PROVIDERS[name].prepare(case, bench.make_inputs(case, CPU, 0))


def follow_links(predicts, accept_index, accept_token_num, candidates, index, next_token, next_sibling, accepts, draw):
    """The walk of sgl-kernel's tree kernels, from first child to next sibling, written from its documentation."""
    for request in range(len(candidates)):
        node, count = 0, 0
        accept_index[request, 0] = index[request, 0]
        while True:
            child = int(next_token[request, node])
            while child != -1 and not accepts(request, node, int(candidates[request, child])):
                child = int(next_sibling[request, child])
            if child == -1 or count + 1 == accept_index.shape[1]:
                break
            predicts[index[request, node]] = candidates[request, child]
            node, count = child, count + 1
            accept_index[request, count] = index[request, node]
        accept_token_num[request] = count
        predicts[index[request, node]] = draw(request, node)


def test_sgl_kernels_greedy_path_is_read_right(monkeypatch):
    def verify_tree_greedy(*arguments):
        *rest, best = arguments
        follow_links(
            *rest,
            accepts=lambda request, node, token: token == int(best[request, node]),
            draw=lambda request, node: best[request, node],
        )

    bench = bench_script("verify_tree")
    sizes = {"num_nodes": 24, "vocab": 11, "batch_size": 5, "temperature": 0.0, "dtype": "float32"}
    case = harness.Case("greedy", "cuda", sizes)
    inputs = bench.make_inputs(case, CPU, 0)
    monkeypatch.setattr(bench, "_sgl_kernel", lambda: SimpleNamespace(verify_tree_greedy=verify_tree_greedy))
    call = bench.PROVIDERS["sgl-kernel"].prepare(case, inputs)
    expected = bench.expected(case, inputs)
    assert len(set(expected.num_accepted.tolist())) > 1
    for _ in range(2):  # its buffers are used again
        assert bench._sgl_mismatch(case, inputs, expected, call()) is None
    wrong = expected._replace(next_token=expected.next_token + 1)
    assert bench._sgl_mismatch(case, inputs, expected, wrong)


def test_sgl_kernels_sampled_path_is_checked_to_be_one(monkeypatch):
    def target_only(*arguments):
        *rest, coins, final_coins, target_probs, draft_probs = arguments
        assert coins.shape == rest[3].shape and final_coins.shape == (len(coins),)
        assert target_probs.dtype == draft_probs.dtype == torch.float32
        follow_links(
            *rest,
            accepts=lambda request, node, token: coins[request, node] < target_probs[request, node, token] * 20,
            draw=lambda request, node: 3,
        )

    bench = bench_script("verify_tree")
    sizes = {"num_nodes": 24, "vocab": 11, "batch_size": 5, "temperature": 0.6, "dtype": "bfloat16"}
    case = harness.Case("sampled", "cuda", sizes)
    inputs = bench.make_inputs(case, CPU, 0)
    fake = SimpleNamespace(tree_speculative_sampling_target_only=target_only)
    monkeypatch.setattr(bench, "_sgl_kernel", lambda: fake)
    path = bench.PROVIDERS["sgl-kernel"].prepare(case, inputs)()
    assert bench._sgl_mismatch(case, inputs, None, path) is None
    tree = typical_tree(24)
    broken = path._replace(nodes=path.nodes.clone(), num_accepted=torch.full_like(path.num_accepted, 2))
    broken.nodes[:, 1] = next(node for node in range(24) if tree.parents[node] > 0)
    assert "no path of the tree" in bench._sgl_mismatch(case, inputs, None, broken)
    outside = path._replace(next_token=path.next_token + 11)
    assert "outside the vocabulary" in bench._sgl_mismatch(case, inputs, None, outside)
    assert verify_tree(*inputs[:3], tree, *inputs[3:]).nodes.shape == path.nodes.shape
