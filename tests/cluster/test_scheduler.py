"""Admission, memory, turns, and the promises that hold for any order of events."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import EngineConfig
from cluster.documents import Documents
from cluster.protocol import EngineError
from cluster.scheduler import Demand, Plan, Scheduler, Start
from spts.cost import reused_flops
from tests.fakes import SHAPE


def demand(request_id: str, **fields: Any) -> Demand:
    usual: dict[str, Any] = {"kv_bytes": 10, "flops": 100, "token_ids": (1, 2, 3), **fields}
    return Demand(request_id=request_id, **{"num_tokens": len(usual["token_ids"]), **usual})


def scheduler(*, document_bytes: int = 0, **fields: Any) -> Scheduler:
    usual: dict[str, Any] = {
        "kv_bytes_limit": 1000,
        "slice_flops": 50,
        "max_running": 4,
        "max_waiting": 4,
        "max_waiting_tokens": 1000,
    }
    return Scheduler(shape=SHAPE, documents=Documents(document_bytes), **{**usual, **fields})


def start(name: str) -> Start:
    return Start(request_id=name)


def run(s: Scheduler, steps: int = 1) -> Plan | None:
    """Steps whose slices do not end the prefill; the last plan."""
    plan = None
    for _ in range(steps):
        plan = s.schedule()
    return plan


def test_worked_example_of_the_docstring():
    s = scheduler()
    s.admit(demand("a"))
    s.admit(demand("b"))
    assert s.schedule() == Plan(start=start("a"), advance="a")
    assert s.schedule() == Plan(advance="a")
    s.prefilled("a")
    assert s.schedule() == Plan(start=start("b"), advance="b", decode=("a",))
    assert s.schedule() == Plan(advance="b", decode=("a",))
    s.prefilled("b")
    assert s.schedule() == Plan(decode=("a", "b"))


def test_a_short_prompt_starts_beside_a_long_one_and_they_take_turns():
    s = scheduler()
    s.admit(demand("long", flops=1000))
    assert s.schedule() == Plan(start=start("long"), advance="long")
    s.admit(demand("longer", flops=2000))
    s.admit(demand("short", flops=100))
    assert s.schedule() == Plan(start=start("short"), advance="short")
    assert s.schedule() == Plan(advance="long")
    assert s.schedule() == Plan(advance="short")
    s.prefilled("short")
    assert s.schedule() == Plan(advance="long", decode=("short",))
    s.prefilled("long")
    assert s.schedule() == Plan(start=start("longer"), advance="longer", decode=("short", "long"))


def test_a_long_prompt_gets_every_other_slice_however_many_short_ones_come():
    s = scheduler(max_waiting=20)
    s.admit(demand("long", flops=1000))
    s.schedule()
    advanced = []
    for number in range(6):
        for name in (f"{number}", f"{number}'"):
            s.admit(demand(name, flops=50))
        plan = s.schedule()
        assert plan is not None
        assert plan.advance is not None
        advanced.append(plan.advance)
        if plan.advance != "long":  # an answer of one token, after one slice
            s.prefilled(plan.advance)
            s.release(plan.advance)
    assert advanced == ["0", "long", "0'", "long", "1", "long"]


def waits(max_running: int, *, streams: int = 64, answer_tokens: int = 32, steps: int = 3000) -> list[float]:
    """Median steps to the first token of prompts of 1, 2 and 16 slices, while `streams` clients each send the
    next request as soon as they have their answer."""
    s = scheduler(max_running=max_running, max_waiting=streams)
    slices: dict[str, int] = {}
    sent: dict[str, int] = {}
    answered: dict[str, int] = {}
    waited: dict[int, list[int]] = {1: [], 2: [], 16: []}
    draw = random.Random(0)

    def send(at: int) -> None:
        name = str(len(slices))
        slices[name], sent[name] = draw.choices((1, 2, 16), (0.5, 0.3, 0.2))[0], at
        s.admit(demand(name, flops=50 * slices[name]))

    for _ in range(streams):
        send(0)
    left = dict(slices)
    for step in range(steps):
        plan = s.schedule()
        assert plan is not None
        for name in plan.decode:
            answered[name] += 1
            if answered[name] == answer_tokens:
                s.release(name)
                send(step)
        if plan.advance is not None:
            name = plan.advance
            left[name] = left.get(name, slices[name]) - 1
            if left[name] == 0:
                s.prefilled(name)
                answered[name] = 1
                waited[slices[name]].append(step - sent[name])
    return [median(each) for each in waited.values()]


def test_under_a_constant_load_places_for_the_usual_number_let_short_prompts_overtake():
    """With few, even a prompt of one slice waits for the end of others' answers; with enough, for the turns
    of two prefills before it."""
    few, usual = waits(8), waits(EngineConfig(model="any").max_running)
    assert few[0] > 100
    assert usual[0] <= 3
    assert usual[1] <= 6


def test_nothing_starts_beside_a_prefill_that_has_less_to_do():
    s = scheduler()
    s.admit(demand("a", flops=100))
    s.admit(demand("b", flops=100))
    s.schedule()
    assert s.schedule() == Plan(advance="a")


def test_without_slices_prefills_go_one_after_another():
    s = scheduler(slice_flops=None)
    s.admit(demand("long", flops=1000))
    s.admit(demand("short", flops=1))
    s.schedule()
    s.prefilled("long")
    assert s.schedule() == Plan(start=start("short"), advance="short", decode=("long",))


def test_nothing_to_do_is_none():
    s = scheduler()
    assert s.schedule() is None
    s.admit(demand("a"))
    s.release("a")
    s.release("a")
    assert s.schedule() is None


def test_one_more_than_running_and_waiting_is_overloaded():
    s = scheduler(max_running=2, max_waiting=1)
    for request_id in "abc":
        s.admit(demand(request_id))
    with pytest.raises(EngineError, match=r"at most 3 \(2 running and 1 waiting\)") as refused:
        s.admit(demand("d"))
    assert refused.value.kind == "overloaded"
    s.release("b")
    s.admit(demand("d"))


def test_more_prompt_tokens_than_may_wait_are_overloaded_but_one_prompt_may_always_wait():
    s = scheduler(max_waiting_tokens=10)
    s.admit(demand("a", token_ids=(1,) * 50))
    with pytest.raises(EngineError, match="waiting must be at most 10, got 50 and 1 more") as refused:
        s.admit(demand("b", token_ids=(1,)))
    assert refused.value.kind == "overloaded"
    s.schedule()
    s.admit(demand("b", token_ids=(1,) * 6))
    s.admit(demand("c", token_ids=(1,) * 4))
    with pytest.raises(EngineError, match="got 10 and 1 more"):
        s.admit(demand("d", token_ids=(1,)))


def test_a_request_waits_for_memory_and_nobody_passes_it():
    s = scheduler(kv_bytes_limit=100)
    s.admit(demand("a", kv_bytes=60))
    s.schedule()
    s.prefilled("a")
    s.admit(demand("big", kv_bytes=50))
    s.admit(demand("small", kv_bytes=10, flops=1))
    assert run(s, 3) == Plan(decode=("a",))
    s.release("a")
    assert s.reserved_bytes == 0
    assert s.schedule() == Plan(start=start("big"), advance="big")
    assert s.reserved_bytes == 50


def test_a_prefill_aborted_halfway_gives_way_to_the_next():
    s = scheduler()
    s.admit(demand("a"))
    s.admit(demand("b"))
    s.schedule()
    s.release("a")
    assert s.schedule() == Plan(start=start("b"), advance="b")
    assert s.reserved_bytes == 10


# -- documents -----------------------------------------------------------------------------------------------

TEXT = tuple(range(100))


def asks(request_id: str, *question: int, **more: Any) -> Demand:
    usual = {"kv_bytes": 10, "layers": (2, 1.0), "document_bytes": 1}
    return demand(request_id, token_ids=(*TEXT, *question), **{**usual, **more})


def answered(s: Scheduler, sent: Demand) -> Start:
    """Run a request from its start to its release; what it was started with."""
    s.admit(sent)
    plan = s.schedule()
    assert plan is not None
    assert plan.start is not None
    if plan.start.keep is not None:
        s.kept(plan.start.keep[0])
    s.prefilled(sent.request_id)
    s.release(sent.request_id)
    return plan.start


def test_the_next_question_begins_with_what_the_first_left():
    s = scheduler(document_bytes=500)
    first = answered(s, asks("a", 500, 501))
    assert (first.reuse, first.keep) == (None, (1, 101))
    then = answered(s, asks("b", 600, 601))
    assert (then.reuse, then.keep) == ((1, 100), None), "two new tokens are not worth keeping"
    long = answered(s, asks("c", *range(700, 800)))
    assert (long.reuse, long.keep) == ((1, 100), (2, 199))
    assert s.document_bytes == 101 + 99
    assert answered(s, asks("d", *range(700, 750))).reuse == (2, 149)


def test_where_attention_is_sparse_whole_blocks_are_kept_and_reused_at_one_density():
    s = scheduler(document_bytes=500)
    sparse = {"layers": (2, 0.1), "block_tokens": 32}
    assert answered(s, asks("a", 500, 501, **sparse)) == Start(request_id="a", keep=(1, 96))
    then = answered(s, asks("b", *range(600, 700), **sparse))
    assert (then.reuse, then.keep) == ((1, 96), (2, 192))
    assert answered(s, asks("c", *range(600, 629), **sparse)).reuse == (2, 128)
    assert answered(s, asks("d", *range(600, 627), **sparse)).reuse == (1, 96)
    assert answered(s, asks("e", 500, 501, **{**sparse, "layers": (2, 0.2)})).reuse is None
    assert answered(s, asks("f", 500, 501)).reuse is None
    assert answered(s, asks("g", 500, 501)).reuse == (4, 101)
    given = answered(s, asks("h", 500, 501, prefix_tokens=64, **sparse))
    assert (given.reuse, given.keep) == ((1, 64), None)


def test_of_a_prompt_in_blocks_without_room_the_first_whole_ones_are_kept():
    s = scheduler(document_bytes=80)
    asked = [asks(name, 500, layers=(2, 0.1), block_tokens=32) for name in "ab"]
    assert answered(s, asked[0]).keep == (1, 64)
    assert answered(s, asked[1]) == Start(request_id="b", reuse=(1, 64))


def test_a_given_prefix_is_reused_and_kept_as_it_is_or_not_at_all():
    s = scheduler(document_bytes=500)
    assert answered(s, asks("a", 500, prefix_tokens=0)) == Start(request_id="a")
    assert answered(s, asks("b", 500, prefix_tokens=5)).keep == (1, 5)
    assert answered(s, asks("c", 500, prefix_tokens=5)).reuse == (1, 5)
    assert answered(s, asks("d", 500, prefix_tokens=4)).reuse == (1, 4)
    assert answered(s, asks("e", 500, prefix_tokens=6)) == Start(request_id="e", keep=(2, 6))
    assert answered(s, asks("f", 500)).reuse is None, "too short to be worth it"


def test_of_a_prompt_without_room_the_first_tokens_are_kept():
    s = scheduler(document_bytes=150)
    long = (*TEXT, *range(1000, 1100))
    asked = [demand(name, token_ids=(*long, 7, 8), layers=(2, 1.0), document_bytes=1) for name in "abc"]
    assert answered(s, asked[0]) == Start(request_id="a", keep=(1, 150))
    assert answered(s, asked[1]) == Start(request_id="b", reuse=(1, 150))
    assert s.document_bytes == 150
    tiny = scheduler(document_bytes=63)
    assert answered(tiny, asked[2]) == Start(request_id="c"), "so few are not worth it"


def test_a_question_on_a_known_document_counts_as_what_is_left_of_it():
    """It passes a prompt that costs less than its document, and nobody is told to wait for the document."""
    s = scheduler(document_bytes=500)
    flops = 3 * reused_flops(SHAPE, 100, 2)
    answered(s, asks("a", 500, flops=flops))
    s.admit(demand("long", flops=flops // 2))
    s.schedule()
    before = s.queued_flops
    s.admit(asks("question", 600, flops=flops // 3 + 10))
    assert s.queued_flops - before == 10
    assert s.schedule() == Plan(start=Start(request_id="question", reuse=(1, 100)), advance="question")


def test_a_question_whose_document_is_gone_counts_in_full_again():
    s = scheduler(document_bytes=500)
    flops = reused_flops(SHAPE, 100, 2) + 10
    answered(s, asks("a", 500))
    s.admit(asks("question", 600, flops=flops))
    assert s.queued_flops == 10
    s._documents.shrink(0)
    assert s.queued_flops == flops


def test_documents_go_when_requests_need_their_room():
    s = scheduler(document_bytes=500, kv_bytes_limit=200)
    answered(s, asks("a", 500))
    assert s.document_bytes == 100
    s.admit(demand("big", kv_bytes=150))
    assert s.schedule() == Plan(forget=(1,), start=start("big"), advance="big")
    assert s.document_bytes == 0


def test_a_document_for_which_there_is_no_room_beside_its_reader_is_not_read():
    s = scheduler(document_bytes=500, kv_bytes_limit=200)
    answered(s, asks("a", 500))
    s.admit(asks("b", 500, kv_bytes=150))
    assert s.schedule() == Plan(forget=(1,), start=start("b"), advance="b")


def test_a_document_that_is_read_stays_until_the_ranks_have_heard_that_its_reader_is_gone():
    s = scheduler(document_bytes=500, kv_bytes_limit=200)
    answered(s, asks("a", 500))
    s.admit(asks("b", 500, kv_bytes=50))
    s.schedule()
    s.admit(demand("big", kv_bytes=150, flops=1))
    assert s.schedule() == Plan(advance="b")
    s.release("b")
    assert s.schedule() == Plan(forget=(1,), start=start("big"), advance="big")


def test_a_document_whose_prefill_was_aborted_is_not_there():
    s = scheduler(document_bytes=500)
    s.admit(asks("a", 500))
    s.schedule()
    assert s.document_bytes == 100
    s.release("a")
    assert s.schedule() is None
    assert s.document_bytes == 0
    assert answered(s, asks("b", 500)).reuse is None


def test_a_document_that_was_left_while_its_request_was_aborted_is_there():
    s = scheduler(document_bytes=500)
    s.admit(asks("a", 500))
    s.schedule()
    s.release("a")
    s.kept(1)  # the step that ran meanwhile was its last
    assert s.schedule() is None
    assert answered(s, asks("b", 600)).reuse == (1, 100)


class Life(RuleBasedStateMachine):
    """Any order of arrivals, steps and departures; a prefill ends after as many slices as it costs."""

    @initialize(
        limit=st.integers(20, 100),
        slice_flops=st.sampled_from([None, 10, 35]),
        max_running=st.integers(1, 4),
        max_waiting=st.integers(0, 4),
        document_bytes=st.sampled_from([0, 30, 500]),
    )
    def begin(self, limit, slice_flops, max_running, max_waiting, document_bytes):
        self.documents = Documents(min(document_bytes, limit))
        self.s = Scheduler(
            shape=SHAPE,
            documents=self.documents,
            kv_bytes_limit=limit,
            slice_flops=slice_flops,
            max_running=max_running,
            max_waiting=max_waiting,
            max_waiting_tokens=300,
        )
        self.limit, self.slice_flops, self.in_flight = limit, slice_flops, max_running + max_waiting
        self.max_running = max_running
        self.alive: dict[str, Demand] = {}
        self.left: dict[str, int] = {}  # FLOP of prefills
        self.leaves: dict[str, int] = {}
        self.running: list[str] = []
        self.passed: tuple[str, ...] = ()  # the oldest prefill, if the latest slice was another's
        self.on_ranks: set[int] = set()
        self.number = 0

    @rule(
        kv_bytes=st.integers(1, 110),
        flops=st.integers(1, 120),
        shared=st.integers(0, 90),
        own=st.integers(1, 70),
        prefix_tokens=st.sampled_from([None, None, 0, 1]),
        block_tokens=st.sampled_from([1, 1, 16]),
    )
    def arrive(self, kv_bytes, flops, shared, own, prefix_tokens, block_tokens):
        self.number += 1
        name = str(self.number)
        token_ids = (*range(shared), *(1000 * self.number + place for place in range(own)))
        sent = Demand(
            request_id=name,
            token_ids=token_ids,
            num_tokens=len(token_ids),
            kv_bytes=min(kv_bytes, self.limit),
            flops=flops,
            layers=(0 if own == 1 else 2, 1.0 if block_tokens == 1 else 0.5),
            document_bytes=1,
            block_tokens=block_tokens,
            prefix_tokens=prefix_tokens and block_tokens * (len(token_ids) > block_tokens),
        )
        waiting = [each for each in self.alive if each not in self.left and each not in self.running]
        tokens = sum(len(self.alive[each].token_ids) for each in waiting)
        if len(self.alive) < self.in_flight and (not tokens or tokens + len(token_ids) <= 300):
            self.s.admit(sent)
            self.alive[name] = sent
        else:
            with pytest.raises(EngineError) as refused:
                self.s.admit(sent)
            assert refused.value.kind == "overloaded"

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def depart(self, data):
        self._gone(data.draw(st.sampled_from(sorted(self.alive))))

    def _gone(self, name):
        del self.alive[name]
        self.left.pop(name, None)
        self.leaves.pop(name, None)
        if name in self.running:
            self.running.remove(name)
        self.s.release(name)

    @rule(aborted=st.booleans())
    def step(self, aborted=False):
        plan = self.s.schedule()
        if plan is None:
            assert not self.alive
            return
        assert set(plan.forget) <= self.on_ranks
        self.on_ranks -= set(plan.forget)
        assert list(plan.decode) == self.running, "every running request decodes"
        if plan.start is not None:
            name = plan.start.request_id
            assert plan.advance == name
            oldest_waiting = next(
                each for each in self.alive if each not in self.left and each not in self.running
            )
            assert self.left or name == oldest_waiting, "first come, first served, but beside a prefill"
            self.left[name] = self.alive[name].flops
            if plan.start.reuse is not None:
                assert plan.start.reuse[0] in self.on_ranks
                assert 0 < plan.start.reuse[1] < len(self.alive[name].token_ids)
                assert plan.start.reuse[1] % self.alive[name].block_tokens == 0
            if plan.start.keep is not None:
                self.leaves[name] = plan.start.keep[0]
                assert plan.start.keep[1] % self.alive[name].block_tokens == 0
        assert len(self.left) <= 2
        if plan.advance is not None:
            oldest = next(iter(self.left))
            others = plan.advance != oldest
            assert not (others and self.passed == (oldest,)), "the oldest gets every other slice"
            self.passed = (oldest,) if others else ()
            self._slice(plan.advance, aborted)

    def _slice(self, name, aborted):
        self.left[name] -= self.left[name] if self.slice_flops is None else self.slice_flops
        ended, leaves = self.left[name] <= 0, self.leaves.get(name)
        if aborted:  # while the step runs
            self._gone(name)
        if ended:
            if leaves is not None:
                self.on_ranks.add(leaves)
                self.s.kept(leaves)
            if not aborted:
                del self.left[name]
                self.leaves.pop(name, None)
                self.s.prefilled(name)
                self.running.append(name)

    @invariant()
    def memory_is_never_over_committed(self):
        reserved = sum(self.alive[name].kv_bytes for name in (*self.left, *self.running))
        assert self.s.reserved_bytes == reserved
        assert reserved + self.s.document_bytes <= self.limit
        assert self.s.document_bytes <= self.documents.max_bytes
        kept = self.documents._kept.values()
        assert self.documents.free_bytes == sum(each.num_bytes for each in kept if not each.users)
        assert self.s.num_running <= self.max_running
        assert self.s.num_running + self.s.num_waiting == len(self.alive)

    def teardown(self):
        """Whoever is left comes to an end, if every answer does: nobody waits for ever."""
        if not hasattr(self, "s"):
            return
        for _ in range(200):
            if not self.alive:
                break
            before = list(self.running)
            self.step()
            for name in before:  # an answer of one token
                self._gone(name)
        assert not self.alive
        self.s.schedule()
        assert self.s.reserved_bytes == 0
        assert self.documents.free_bytes == self.documents.num_bytes


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
