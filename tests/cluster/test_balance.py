"""Who gets the next prompt: the least loaded replica, or within a bound the one that read its document."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.balance import AVOID_S, BLOCK_TOKENS, Balance, Placement, block_digests

IDLE = {"a": 0, "b": 0}


def document(seed: int, num_blocks: int) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=num_blocks * BLOCK_TOKENS)


def go(balance: Balance, token_ids, replicas=IDLE):
    placement = balance.open(token_ids)
    placement.rank(replicas)
    return placement


def test_the_worked_example():
    balance = Balance(affinity_tokens=4096)
    text = document(0, 32)
    first = go(balance, text + [1] * 40)
    assert (first.replica, balance._ahead) == ("a", {"a": 8232})
    first.close()
    assert balance._ahead == {}
    question = go(balance, text + [2] * 50)
    assert question.replica == "a", "b is as idle, and has not read it"
    question.close()
    assert go(balance, [3] * 4096, {"a": 0}).replica == "a"
    at_the_bound = go(balance, [*text, 4])
    assert at_the_bound.replica == "a", "4096 tokens more than b"
    over = go(balance, [*text, 5])
    assert over.replica == "b"
    at_the_bound.close()
    over.close()
    assert go(balance, [*text, 6]).replica == "b", "its document is b's from then on"


def test_documents_spread_over_idle_replicas():
    balance = Balance(affinity_tokens=4096)
    went = []
    for seed in range(6):
        placement = go(balance, document(seed, 2), {"a": 0, "b": 0, "c": 0})
        went.append(placement.replica)
        placement.close()
    assert went == ["a", "b", "c"] * 2


def test_what_other_routers_sent_counts_too():
    balance = Balance(affinity_tokens=0)
    assert go(balance, [1] * 100, {"a": 500, "b": 100}).replica == "b"
    assert go(balance, [1] * 100, {"a": 500, "b": 450}).replica == "a", "b has 550 with the first"


def test_a_beginning_that_saves_little_is_worth_little_waiting():
    """All chats begin with the same words; that is no reason to wait behind an 8K prompt."""
    balance = Balance(affinity_tokens=2**15)
    words = document(0, 1)
    first = go(balance, words + document(1, 32))
    assert first.replica == "a"
    assert go(balance, words + document(2, 4)).replica == "b"


def test_the_longest_beginning_decides():
    balance = Balance(affinity_tokens=2**15)
    text = document(0, 8)
    go(balance, text[: 2 * BLOCK_TOKENS] + document(1, 2)).close()
    go(balance, text, {"a": 9999, "b": 0}).close()
    assert go(balance, [*text, 1]).replica == "b"
    assert go(balance, text[: 2 * BLOCK_TOKENS] + document(1, 2)).replica == "a"


def test_a_replica_that_failed_comes_last_for_a_while():
    now = [100.0]
    balance = Balance(affinity_tokens=2**15, clock=lambda: now[0])
    text = document(0, 4)
    placement = go(balance, text)
    placement.fail()
    assert balance._ahead == {}
    retried = balance.open(text)
    assert retried.rank(IDLE) == ["b", "a"], "though a has read it and b has not"
    retried.close()
    assert balance.open([1]).rank({"a": 0}) == ["a"], "there is no other"
    now[0] += AVOID_S
    assert go(balance, [1], {"a": 0, "b": 9}).replica == "a"


def test_a_replica_that_is_not_ready_comes_last():
    balance = Balance(affinity_tokens=2**15)
    assert balance.open([1] * 9).rank({"a": None, "b": 10**6}) == ["b", "a"]
    assert balance.open([1] * 9).rank({"a": None, "b": None})[0] == "a", "b has 9 ahead"


def test_a_replica_that_refused_a_prompt_comes_last_for_that_prompt_alone():
    balance = Balance(affinity_tokens=2**15)
    text = document(0, 4)
    placement = go(balance, text)
    assert (placement.replica, placement.refuse()) == ("a", True)
    assert balance._ahead == {}
    assert placement.rank({"a": 0, "b": 10**6}) == ["b", "a"]
    assert go(balance, [1] * 9).replica == "a", "it may have room again by now"
    assert not placement.refuse(), "both are full"
    assert not placement.refuse(), "it is nowhere"


@pytest.mark.parametrize("replicas", [{"a": 0}, {"a": 0, "b": None}])
def test_who_is_refused_by_the_only_one_that_is_ready_need_not_try_again(replicas):
    assert not go(Balance(affinity_tokens=0), [1] * 9, replicas).refuse()


def test_serve_sends_it_to_a_replica_that_has_refused_it_once_at_most():
    placement = go(Balance(affinity_tokens=0), [1] * 9, {"a": 0, "b": 0, "c": 0})
    for again in (True, False):
        placement.move("a")
        assert placement.refuse() == again
        placement.rank({"a": 0, "b": 0, "c": 0})


def test_serve_may_send_it_elsewhere_than_advised():
    balance = Balance(affinity_tokens=2**15)
    text = document(0, 4)
    placement = go(balance, text)
    placement.move("b")
    assert balance._ahead == {"b": len(text)}
    placement.close()
    assert go(balance, text).replica == "b"


def test_ranked_again_it_counts_once():
    balance = Balance(affinity_tokens=0)
    placement = go(balance, [1] * 10)
    placement.rank(IDLE)
    assert balance._ahead == {placement.replica: 10}


def test_closed_it_counts_no_more_whatever_serve_does_then():
    """A client may leave while Serve still looks for a replica, on another thread."""
    balance = Balance(affinity_tokens=0)
    placement = balance.open([1] * 10)
    placement.close()
    assert placement.rank(IDLE) == ["a", "b"]
    placement.move("b")
    placement.close()
    assert balance._ahead == {}


def test_no_replicas_no_place():
    balance = Balance(affinity_tokens=0)
    placement = balance.open(document(0, 2))
    assert placement.rank({}) == []
    assert (placement.replica, balance._ahead) == (None, {})


def test_with_one_replica_nothing_is_remembered():
    balance = Balance(affinity_tokens=2**15)
    go(balance, document(0, 4), {"a": 0})
    assert len(balance._readers) == 0


@pytest.mark.parametrize("num_tokens", [0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, 3 * BLOCK_TOKENS + 7])
def test_one_digest_for_each_whole_block(num_tokens):
    tokens = document(1, 4)[:num_tokens]
    assert len(block_digests(tokens)) == num_tokens // BLOCK_TOKENS


@given(shared=st.integers(0, 4 * BLOCK_TOKENS))
def test_digests_agree_as_far_as_prompts_do(shared):
    ours, theirs = document(1, 4), document(2, 4)
    both = zip(block_digests(ours), block_digests(ours[:shared] + theirs[shared:]), strict=True)
    same = [one == other for one, other in both]
    assert same == [place < shared // BLOCK_TOKENS for place in range(4)]


# A step: a prompt of (document, blocks of it, tokens of a question) arrives, the n-th open one ends, or the
# n-th replica goes or comes back.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 400)),
        st.tuples(st.just("close"), st.integers(0, 9)),
        st.tuples(st.just("fail"), st.integers(0, 9)),
        st.tuples(st.just("toggle"), st.integers(0, 3)),
    ),
    max_size=60,
)
DOCUMENTS = [document(seed, 5) for seed in range(4)]


@settings(max_examples=150, deadline=None)
@given(
    steps=STEPS, affinity_tokens=st.sampled_from([0, 100, 700, 10**6]), max_blocks=st.sampled_from([3, 99])
)
def test_never_more_than_the_bound_worse_and_faithful_within_it(steps, affinity_tokens, max_blocks):
    """Against a plain account of the same: lists of what is open where, and of who was last sent what."""
    balance = Balance(affinity_tokens=affinity_tokens, max_blocks=max_blocks, clock=lambda: 0.0)
    present = {"a", "b", "c"}
    failed: set[str] = set()
    opened: list[Placement] = []
    last_reader: dict[tuple[int, ...], str] = {}
    for kind, *args in steps:
        if kind == "toggle":
            present ^= {"abcd"[args[0]]}
        elif kind in ("close", "fail") and opened:
            placement = opened.pop(args[0] % len(opened))
            if kind == "fail" and placement.replica is not None:
                failed.add(placement.replica)
            getattr(placement, kind)()
        elif kind == "open" and present:
            failed &= present  # a replica that comes back is a new one
            which, num_blocks, question = args
            tokens = DOCUMENTS[which][: num_blocks * BLOCK_TOKENS] + [which] * question
            before = {name: sum(p.num_tokens for p in opened if p.replica == name) for name in present}
            usable = {n: load for n, load in before.items() if n not in failed} or before
            placement = go(balance, tokens, dict.fromkeys(sorted(present), 0))
            opened.append(placement)
            excess = usable[placement.replica] - min(usable.values())  # KeyError: sent where it must not go
            assert excess <= min(affinity_tokens, len(tokens))
            prefixes = [tuple(tokens[:end]) for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)] * (
                len(present) > 1
            )
            readers = [(last_reader.get(prefix), len(prefix)) for prefix in reversed(prefixes)]
            near = [
                name
                for name, saved in readers
                if name in usable and usable[name] - min(usable.values()) <= min(affinity_tokens, saved)
            ]
            if max_blocks == 99:  # nothing was forgotten
                assert excess == 0 if not near else placement.replica == near[0]
            last_reader |= dict.fromkeys(prefixes, placement.replica)
        expected = {p.replica: 0 for p in opened if p.num_tokens}
        for placement in opened:
            if placement.num_tokens:
                expected[placement.replica] += placement.num_tokens
        assert +balance._ahead == expected  # without what is 0
        assert len(balance._readers) <= max_blocks
    for placement in opened:
        placement.close()
    assert +balance._ahead == {}
