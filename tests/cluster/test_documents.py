"""What is found of a prompt among those kept, against a plain list; what goes first; that bytes add up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.documents import LEAST_TOKENS, Documents, Layers, _common

DENSE = (4, 1.0)

A, B, C = (tuple(range(start, start + 100)) for start in (1, 201, 401))


def keep(
    documents: Documents, token_ids: tuple[int, ...], layers: Layers = DENSE, block_tokens: int = 1
) -> int:
    """Keep all of a prompt at a byte a token, going on from what is there already; returns its name."""
    before, length = documents.find(token_ids, layers, len(token_ids), block_tokens=block_tokens)
    document = documents.reserve(token_ids[length:], layers, before, length, len(token_ids) - length)
    documents.keep(document.name)
    return document.name


def test_questions_about_one_document_hold_it_once():
    documents = Documents(1000)
    keep(documents, A + B)
    keep(documents, A + C)
    assert documents.num_bytes == 300
    for question in (B, C):
        assert documents.find(A + question, DENSE, 199)[1] == 199
    assert documents.find(A + B[:10] + C, DENSE, 209)[1] == 110
    assert documents.find(A[:63] + C, DENSE, 162)[1] == 63
    assert documents.find(C + A, DENSE, 199) == (None, 0)


@pytest.mark.parametrize("other", [(12, 1.0), (4, 0.5)], ids=["depth", "density"])
def test_what_ran_other_layers_or_in_another_way_finds_nothing(other):
    documents = Documents(1000)
    keep(documents, A)
    assert documents.find(A, other, 99) == (None, 0)
    keep(documents, A, other)
    assert documents.num_bytes == 200


def test_leaves_go_first_and_the_latest_used_last():
    documents = Documents(1000)
    first, second, third = keep(documents, A + B), keep(documents, A + C), keep(documents, C)
    found, _ = documents.find(A + B, DENSE, 200)
    assert found is not None
    documents.use(found, 1)
    documents.use(found, -1)
    documents.shrink(299)
    assert documents.take_forgotten() == (second, third)
    documents.shrink(0)
    assert documents.take_forgotten() == (first,)
    assert documents.num_bytes == documents.free_bytes == 0
    assert documents.find(A, DENSE, 100) == (None, 0)


def test_what_is_read_stays_and_so_does_what_it_goes_on_from():
    documents = Documents(1000)
    keep(documents, A)
    keep(documents, A + B)
    keep(documents, C)
    found, _ = documents.find(A + B, DENSE, 200)
    assert found is not None
    documents.use(found, 1)
    assert documents.free_bytes == 100
    documents.shrink(0)
    assert documents.num_bytes == 200
    documents.use(found, -1)
    documents.shrink(0)
    assert documents.num_bytes == 0


def test_two_that_leave_the_same_document_leave_it_once():
    documents = Documents(1000)
    first, second = (documents.reserve(A, DENSE, None, 0, 100) for _ in range(2))
    assert documents.find(A, DENSE, 100) == (None, 0), "before it is there nobody finds it"
    documents.keep(first.name)
    documents.keep(second.name)
    assert documents.take_forgotten() == (second.name,)
    assert documents.num_bytes == 100


def test_one_that_is_given_up_leaves_nothing():
    documents = Documents(1000)
    keep(documents, A)
    before, length = documents.find(A + B, DENSE, 200)
    document = documents.reserve(B, DENSE, before, length, 100)
    assert documents.free_bytes == 0
    documents.abandon(document.name)
    documents.keep(document.name)
    assert (documents.num_bytes, documents.free_bytes) == (100, 100)
    assert documents.take_forgotten() == ()


def test_of_many_roots_with_one_template_only_those_that_are_worth_it_are_looked_at(monkeypatch):
    compared = []

    def common(*args):
        compared.append(args)
        return _common(*args)

    monkeypatch.setattr("cluster.documents._common", common)
    documents = Documents(10**6)
    template = tuple(range(1, 31))
    texts = [(*template, *range(1000 * number, 1000 * number + 200)) for number in range(1, 101)]
    for text in texts:
        documents.keep(documents.reserve(text, DENSE, None, 0, len(text)).name)
    assert documents.find((*template, *range(100)), DENSE, 100, LEAST_TOKENS) == (None, 0)
    assert not compared
    found, length = documents.find((*texts[41], 7, 8), DENSE, 231, LEAST_TOKENS)
    assert (found and found.token_ids, length, len(compared)) == (texts[41], 230, 1)
    assert documents.find((*template, 7, 8), DENSE, 31, 30)[1] == 30, "fewer, if so few are asked for"
    assert documents.find((*template, 7, 8), DENSE, 31, 31) == (None, 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_longest_common_beginning_is_found_and_bytes_add_up(seed):
    """Prompts over two tokens, so that they share beginnings of all lengths, blocks and odd ends."""
    draw = random.Random(seed)
    block = draw.choice([1, 1, 4, 32])  # where attention is sparse, whole blocks are kept and found
    documents = Documents(10**6)
    held: dict[int, tuple[int, ...]] = {}
    for _ in range(draw.randint(1, 25)):
        if held and draw.random() < 0.7:
            base = draw.choice(list(held.values()))[: draw.choice([1, 63, 64, 65, 127, 128, 129, 200])]
        else:
            base = ()
        token_ids = base + tuple(draw.choices((1, 2), k=draw.choice([1, 5, 64, 130])))
        limit = draw.randint(0, len(token_ids))
        _, length = documents.find(token_ids, DENSE, limit, block_tokens=block)
        shared = max((_shared(token_ids[:limit], other) for other in held.values()), default=0)
        assert length == shared - shared % block
        worth_it = length if length >= LEAST_TOKENS else 0
        assert documents.find(token_ids, DENSE, limit, LEAST_TOKENS, block)[1] == worth_it
        assert documents.free_bytes == sum(each.num_bytes for each in documents._kept.values())
        whole = token_ids[: len(token_ids) - len(token_ids) % block]
        if whole and all(other[: len(whole)] != whole for other in held.values()):
            held[keep(documents, whole, block_tokens=block)] = whole
        if draw.random() < 0.2:
            documents.shrink(documents.num_bytes // 2)
            for name in documents.take_forgotten():
                del held[name]
        distinct = {token_ids[:end] for token_ids in held.values() for end in range(1, len(token_ids) + 1)}
        assert documents.num_bytes >= len(distinct), "every kept beginning is somewhere"
    documents.shrink(0)
    assert documents.num_bytes == 0
    assert set(documents.take_forgotten()) == set(held)


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length
