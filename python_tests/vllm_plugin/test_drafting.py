"""The draft in batches: what it grows is what the ordinary loop would, whatever the company and what came before."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from support.batched_draft import Requests, drafter_of
from support.native_models import case_model, case_pair

from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.ops import VerifiedPath
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.vllm import drafting
from sequoia_kernels.vllm.drafting import DraftRequest, TreeDrafter, request_seed

BUSHY = TokenTree([-1, 0, 0, 0, 1, 1, 2, 4])
DEEP = TokenTree([-1, 0, 0, 1, 2, 3, 5, 6, 7])
PAIR = TokenTree([-1, 0])
TREES = (BUSHY, DEEP, PAIR)


@cache
def model_of(name: str = "llama", forward: str = "native") -> TreeModel:
    return getattr(case_pair(name), forward)


def requests_of(model: TreeModel | None = None, seed: int = 0, **settings: int) -> Requests:
    model = model or model_of()
    return Requests(drafter_of(model, **settings), model, random.Random(seed))


def all_free(requests: Requests) -> bool:
    pool = requests.drafter.pool
    return pool.num_free == pool.num_pages and requests.drafter.num_requests == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("name", "forward"),
    [("llama", "native"), ("llama", "modules"), ("mistral", "native"), ("gemma2", "native"), ("gemma2", "modules")],
)
def test_a_batch_grows_what_each_request_would_alone(name, forward, temperature):
    requests = requests_of(model_of(name, forward))
    for index, length in enumerate((2, 3, 17, 40, 33)):
        requests.add(f"r{index}", length, temperature)
    for _ in range(8):
        (drafted,) = requests.step({BUSHY: list(requests.requests)})
        assert len(drafted.place) == 5
    assert requests.num_compared == 40


def test_temperatures_may_differ_in_a_batch():
    requests = requests_of()
    for index, temperature in enumerate((0.0, 0.3, 1.0, 2.5)):
        requests.add(f"r{index}", 9, temperature)
    for _ in range(6):
        requests.step({BUSHY: list(requests.requests)})
    assert requests.num_compared == 24


def test_several_trees_in_one_step():
    requests = requests_of(seed=3)
    for index in range(7):
        requests.add(f"r{index}", 5 + index, 0.7 * (index % 2))
    names = list(requests.requests)
    for _ in range(12):
        requests.rng.shuffle(names)
        cuts = sorted(requests.rng.sample(range(8), 2))
        parts = names[: cuts[0]], names[cuts[0] : cuts[1]], names[cuts[1] :]
        requests.step({tree: part for tree, part in zip(TREES, parts) if part})
    assert requests.num_compared == 84


def test_some_are_committed_and_some_not():
    requests = requests_of(seed=4)
    for index in range(6):
        requests.add(f"r{index}", 8, 0.6)
    for _ in range(15):
        requests.step({DEEP: list(requests.requests)}, committed=0.5)
    assert requests.num_compared == 90


def test_a_request_goes_on_without_trees_and_comes_back():
    requests = requests_of(seed=5)
    for name in "abc":
        requests.add(name, 8, 0.5)
    for step in range(20):
        with_trees = [name for name in "abc" if requests.rng.random() < 0.6]
        if with_trees:
            requests.step({TREES[step % 3]: with_trees})
        requests.plain_step([name for name in "abc" if name not in with_trees])
    assert requests.num_compared > 20


def test_the_order_of_a_batch_may_change_between_growing_and_commit():
    requests = requests_of(seed=6)
    names = [f"r{index}" for index in range(5)]
    for name in names:
        requests.add(name, 11)
    for _ in range(10):
        requests.rng.shuffle(names)  # `Requests` shuffles what is committed, too
        requests.step({BUSHY: names})


def test_the_comparison_notices_rows_that_are_not_moved(monkeypatch):
    monkeypatch.setattr(drafting, "compact_kv_cache_", lambda *args, **settings: None)
    requests = requests_of(seed=1)
    for name in "abcd":
        requests.add(name, 9)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        for _ in range(20):
            requests.step({BUSHY: list("abcd")})


# ---- requests come and go ----


def test_preempted_requests_give_their_pages_back_and_resume_on_their_streams():
    requests = requests_of(seed=7)
    for name in "ab":
        requests.add(name, 30, 0.9)
    for step in range(12):
        requests.step({BUSHY: ["a", "b"]})
        if step % 4 == 1:
            before = requests.drafter.pool.num_free
            requests.drafter.release(["b", "unknown"])
            assert requests.drafter.pool.num_free > before
            assert requests.drafter.num_requests == 2
            requests.add(f"c{step}", 40)  # takes the pages over
            requests.step({BUSHY: [f"c{step}", "a"]})
            requests.end(f"c{step}")
    requests.end("a")
    requests.end("b")
    assert all_free(requests)


def test_a_new_request_of_an_old_name_begins_anew():
    requests = requests_of(seed=8)
    requests.add("a", 20, 0.8)
    requests.step({BUSHY: ["a"]})
    requests.end("a")
    requests.add("a", 25, 0.8)
    requests.step({BUSHY: ["a"]})
    assert requests.num_compared == 2


def test_requests_that_nobody_knows_are_forgotten_in_silence():
    drafter = drafter_of(model_of())
    drafter.forget(["a"])
    drafter.release(["a"])
    assert drafter.num_requests == 0


def test_long_texts_are_caught_up_in_pieces(monkeypatch):
    monkeypatch.setattr(drafting, "ROWS_READ", 16)
    requests = requests_of(seed=9, max_tokens=200)
    requests.add("long", 71)
    requests.add("short", 4)
    waited = 0
    while not (grown := requests.step({BUSHY: ["short", "long"]}))[0].place.get("long"):
        assert [*grown[0].place] == ["short"]
        waited += 1
    # 70 rows, of which each step reads at most 16 and the short one a few; a token is added in every step
    assert waited >= 4
    assert {*requests.step({BUSHY: ["short", "long"]})[0].place} == {"short", "long"}


def test_who_must_draft_reads_all_at_once(monkeypatch):
    monkeypatch.setattr(drafting, "ROWS_READ", 16)
    requests = requests_of(seed=10, max_tokens=200)
    requests.add("long", 90, 1.0)
    requests.add("other", 60, 1.0)
    (drafted,) = requests.step({DEEP: ["long", "other"]}, must_draft=True)
    assert {*drafted.place} == {"long", "other"}


def test_what_is_read_in_a_step_is_limited(monkeypatch):
    monkeypatch.setattr(drafting, "ROWS_READ", 16)
    rows, feed = [], TreeDrafter._feed

    def counted(self, request, tokens):
        rows.append(len(tokens) - request.num_rows)
        feed(self, request, tokens)

    monkeypatch.setattr(TreeDrafter, "_feed", counted)
    requests = requests_of(seed=11, max_tokens=200)
    for name in "abc":
        requests.add(name, 41)
    for _ in range(9):
        rows.clear()
        requests.step({PAIR: list("abc")})
        assert sum(rows) <= 16


# ---- limits ----


def test_no_more_nodes_are_drafted_than_a_step_has_rows():
    requests = requests_of(seed=16, max_rows=20)
    for name in "abcde":
        requests.add(name, 9, 0.5)
    grown = requests.step({PAIR: ["a", "b"], BUSHY: ["c", "d", "e"]})
    assert [[*drafted.place] for drafted in grown] == [["a", "b"], ["c", "d"]]
    first, second = (drafted.draft_logits for drafted in grown)
    assert second.data_ptr() == first.data_ptr() + 4 * first.element_size() * first.shape[2]
    assert requests.step({DEEP: list("abcde")})[0].draft_logits.shape == (2, 9, first.shape[2])
    assert requests.drafter.most_requests(9, 8) == 2


@pytest.mark.parametrize(
    ("limits", "most"), [({"pool_tokens": 200}, 4), ({"max_rows": 14}, 4), ({"max_requests": 3}, 3)]
)
def test_as_many_requests_fit_as_is_said(limits, most):
    requests = requests_of(seed=18, **limits)
    assert requests.drafter.most_requests(33, 3) == most
    for index in range(most):
        requests.add(f"r{index}", 33)
    (drafted,) = requests.step({TokenTree.chain(3): list(requests.requests)}, must_draft=True)
    assert len(drafted.place) == most and requests.drafter.num_without_room == 0


def test_logits_of_all_trees_share_their_memory():
    requests = requests_of(seed=17)
    for name in "abc":
        requests.add(name, 9, 0.5)
    places = set()
    for tree in (*TREES, TokenTree.chain(3), TokenTree.chain(5)):
        for names in ("a", "ab", "abc"):
            (drafted,) = requests.step({tree: list(names)})
            places.add(drafted.draft_logits.data_ptr())
    assert len(places) == 1
    assert len(requests.drafter._buffers) <= drafting.KEPT_BATCHES


def test_a_request_without_room_waits_and_the_others_do_not():
    # a page holds 16 rows: room for two requests of up to 32 rows each
    requests = requests_of(seed=12, max_requests=4, max_tokens=24, max_nodes=8, pool_tokens=64)
    for name in "abc":
        requests.add(name, 18)
    (drafted,) = requests.step({BUSHY: list("abc")}, committed=0.0)
    assert [*drafted.place] == ["a", "b"]
    assert requests.drafter.num_without_room == 1
    requests.end("a")
    (drafted,) = requests.step({BUSHY: ["b", "c"]})
    assert [*drafted.place] == ["b", "c"]
    for name in "bc":
        requests.end(name)
    assert all_free(requests)


def test_nothing_is_grown_where_nobody_has_room():
    requests = requests_of(max_requests=2, max_tokens=24, max_nodes=8, pool_tokens=1)
    requests.add("a", 20)
    requests.add("b", 20)
    assert [*requests.step({BUSHY: ["a"]})[0].place] == ["a"]
    assert requests.step({BUSHY: ["b"]}) == []


def test_the_pool_has_the_size_that_was_asked_for():
    model = model_of()
    per_token = TreeDrafter.bytes_per_token(model)
    for tokens, pages in ((320, 20), (321, 21), (1, 7), (10**6, 7 * 4)):
        drafter = drafter_of(model, max_requests=4, max_tokens=96, max_nodes=12, pool_tokens=tokens)
        assert drafter.pool.num_pages == pages  # at least one request's, at most those of all
        assert drafter.cache.num_bytes == pages * 16 * per_token


def test_a_text_beyond_the_drafts_positions_gets_no_tree():
    model = adapt(case_model("gpt2", n_positions=64))  # it has no vectors for more
    assert model.max_positions == 64
    requests = requests_of(model, max_tokens=128)
    requests.add("a", 62)
    requests.add("b", 65)
    assert [*requests.step({PAIR: ["a", "b"]})[0].place] == ["a"]
    assert requests.drafter.pool.num_free < requests.drafter.pool.num_pages
    requests.plain_step(["a", "a", "a"])
    assert requests.step({PAIR: ["a", "b"]}) == []
    assert requests.drafter.pool.num_free == requests.drafter.pool.num_pages  # pages that nobody will read again


def test_a_tree_at_the_end_of_the_longest_text():
    requests = requests_of(max_tokens=48, max_nodes=8)
    requests.add("a", 48)
    (drafted,) = requests.step({BUSHY: ["a"]})
    assert [*drafted.place] == ["a"]


def test_commits_of_requests_that_were_released_or_forgotten_are_nothing():
    """Between growing and commit a request may be preempted or aborted."""
    requests = requests_of(seed=13)
    for name in "abc":
        requests.add(name, 12, 0.5)
    (drafted,) = requests.step({BUSHY: list("abc")}, committed=0.0)
    requests.drafter.release(["a"])
    requests.drafter.forget(["b"])
    path = VerifiedPath(torch.tensor([[0, 2, 6]] * 3).int(), torch.tensor([3, 3, 3]).int(), torch.tensor([1, 1, 1]))
    lens = torch.tensor([11, 11, 11], dtype=torch.int32)
    requests.drafter.commit(["a", "b", "c"], path, lens)
    requests.drafter.commit(["a", "b"], VerifiedPath(*(part[:2] for part in path)), lens[:2])
    requests.requests["c"].tokens[12:] = [*drafted.tokens[drafted.place["c"], [2, 6]].tolist(), 1]
    del requests.requests["b"]
    requests.step({BUSHY: ["a", "c"]})
    assert requests.num_compared == 5


def test_300_random_arrivals_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(drafting, "ROWS_READ", 32)
    requests = requests_of(seed=14, max_requests=6, max_tokens=80, max_nodes=9, pool_tokens=240)
    rng, arrived, steps, released = requests.rng, 0, 0, 0
    while arrived < 300 or requests.requests:
        steps += 1
        while arrived < 300 and len(requests.requests) < 6 and rng.random() < 0.6:
            requests.add(f"r{arrived}", rng.randrange(2, 50), rng.choice((0.0, 0.7)))
            arrived += 1
        for name in [name for name in requests.requests if len(requests.requests[name].tokens) > 60]:
            requests.end(name)
        for name in [name for name in requests.requests if rng.random() < 0.1]:
            requests.end(name)
        for name in [name for name in requests.requests if rng.random() < 0.1]:
            requests.drafter.release([name])
            released += 1
        names = rng.sample([*requests.requests], len(requests.requests))
        wanted: dict[TokenTree, list[str]] = {}
        for name in names:
            if rng.random() < 0.85:
                wanted.setdefault(rng.choice(TREES), []).append(name)
        # Comparing every tree takes long: the steps in between are grown all the same.
        requests.step(wanted, committed=0.8, compared=steps % 7 == 0)
        owned = [page for request in requests.drafter._requests.values() for page in request.pages]
        assert len(owned) == len({*owned}) == requests.drafter.pool.num_pages - requests.drafter.pool.num_free
    assert all_free(requests)
    assert requests.num_compared > 100 and released > 50 and requests.drafter.num_without_room > 0


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("forward", ["native", "modules"])
def test_a_draft_that_overflows_ends_its_own_trees_alone(forward, temperature, caplog):
    model = adapt(case_model("llama"), forward=forward)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[-1] = torch.nan  # of one token
    requests = requests_of(model, seed=15)
    for name in "abc":
        requests.add(name, 12, temperature)
        requests.requests[name].tokens = [token % (model.vocab_size - 1) for token in requests.requests[name].tokens]
    requests.requests["b"].tokens[3] = model.vocab_size - 1
    before = {name: request.offset for name, request in requests.requests.items()}
    entries = {BUSHY: [requests.entry(name) for name in "abc"]}
    (drafted,) = requests.drafter.grow(entries)
    assert [*drafted.place] == ["a", "c"]
    for name, place in drafted.place.items():
        requests._compare(drafted, name, place)
        assert int(drafted.offsets[place]) == before[name]
    assert [record.getMessage()[:40] for record in caplog.records] == ["trees: none for b any more, its draft ca"]
    assert [*requests.drafter.grow(entries)[0].place] == ["a", "c"]
    assert requests.drafter.grow({PAIR: entries[BUSHY][1:2]}) == []
    assert len(caplog.records) == 1  # said once
    for name in "abc":
        requests.end(name)
    assert all_free(requests)


# ---- random streams ----


def test_requests_without_a_seed_have_streams_of_their_own():
    seeds = {request_seed(f"r{index}", None, engine) for index in range(50) for engine in (0, 1)}
    assert len(seeds) == 100
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert request_seed("a", None, 3) == request_seed("a", None, 3)
    assert request_seed("a", 9, 3) == request_seed("b", 9, 0) == 9
    assert 0 <= request_seed("a", -1, 0) < 1 << 63


def test_engines_of_other_seeds_draw_otherwise():
    grown = []
    for engine_seed in (0, 0, 1):
        drafter = drafter_of(model_of(), engine_seed=engine_seed)
        entry = DraftRequest("a", np.arange(9), 1.0, None)
        (drafted,) = drafter.grow({BUSHY: [entry]})
        grown.append(drafted.tokens.tolist())
    assert grown[0] == grown[1] != grown[2]
