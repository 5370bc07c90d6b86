"""Pages of the draft's pool: nobody has another's, and all come back."""

from __future__ import annotations

import random

from sequoia_kernels.vllm.pages import PagePool


def test_pages_are_taken_as_rows_need_them():
    pool, pages = PagePool(4, 16), []
    assert pool.grow(pages, 1) and len(pages) == 1
    assert pool.grow(pages, 16) and len(pages) == 1
    assert pool.grow(pages, 17) and len(pages) == 2
    assert pool.grow(pages, 3) and len(pages) == 2  # what it has it keeps
    assert pool.num_free == 2


def test_nothing_changes_where_too_few_are_free():
    pool, mine, others = PagePool(3, 16), [], []
    assert pool.grow(mine, 32)
    assert not pool.grow(others, 17)
    assert (others, pool.num_free) == ([], 1)
    assert not pool.grow(mine, 100)
    assert (len(mine), pool.num_free) == (2, 1)
    assert pool.grow(others, 16)
    pool.give_back(mine)
    assert (mine, pool.num_free) == ([], 2)


def test_no_page_has_two_owners_and_none_is_lost():
    rng, pool = random.Random(0), PagePool(20, 4)
    owned: list[list[int]] = [[] for _ in range(7)]
    refused = 0
    for _ in range(2000):
        pages = rng.choice(owned)
        if rng.random() < 0.3:
            pool.give_back(pages)
        else:
            refused += not pool.grow(pages, rng.randrange(1, 40))
        held = [page for pages in owned for page in pages]
        assert len(held) == len(set(held)) and set(held) <= set(range(20))
        assert pool.num_free == 20 - len(held)
    assert refused
    for pages in owned:
        pool.give_back(pages)
    assert pool.num_free == 20
