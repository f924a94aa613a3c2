"""Admission, slices of layers, and the promises that hold for any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.protocol import EngineError
from cluster.scheduler import Plan, Scheduler


def scheduler(*, num_layers=8, layers_per_step=4, max_running=4, max_waiting=4) -> Scheduler:
    return Scheduler(
        num_layers=num_layers,
        layers_per_step=layers_per_step,
        max_running=max_running,
        max_waiting=max_waiting,
    )


def test_worked_example_of_the_docstring():
    s = scheduler()
    s.admit("a")
    s.admit("b")
    assert s.schedule() == Plan(start="a", advance=("a", 4), decode=())
    assert s.schedule() == Plan(start=None, advance=("a", 4), decode=())
    assert s.schedule() == Plan(start="b", advance=("b", 4), decode=("a",))
    assert s.schedule() == Plan(start=None, advance=("b", 4), decode=("a",))
    assert s.schedule() == Plan(start=None, advance=None, decode=("a", "b"))


def test_the_last_slice_holds_only_the_layers_left():
    s = scheduler(num_layers=10, layers_per_step=4)
    s.admit("a")
    plans = [s.schedule() for _ in range(3)]
    assert [plan and plan.advance for plan in plans] == [("a", 4), ("a", 4), ("a", 2)]
    assert s.schedule() == Plan(start=None, advance=None, decode=("a",))


def test_nothing_to_do_is_none():
    s = scheduler()
    assert s.schedule() is None
    s.admit("a")
    s.release("a")
    assert s.schedule() is None


def test_one_more_than_running_and_waiting_is_overloaded():
    s = scheduler(max_running=2, max_waiting=1)
    for request_id in "abc":
        s.admit(request_id)
    with pytest.raises(EngineError, match=r"at most 3 \(2 running and 1 waiting\)") as refused:
        s.admit("d")
    assert refused.value.kind == "overloaded"
    s.release("b")
    s.admit("d")


def test_running_requests_are_bounded_and_the_next_starts_when_one_ends():
    s = scheduler(num_layers=4, max_running=1)
    s.admit("a")
    s.admit("b")
    assert s.schedule() == Plan(start="a", advance=("a", 4), decode=())
    assert s.schedule() == Plan(start=None, advance=None, decode=("a",))
    s.release("a")
    assert s.schedule() == Plan(start="b", advance=("b", 4), decode=())


def test_a_prefill_aborted_halfway_gives_way_to_the_next():
    s = scheduler()
    s.admit("a")
    s.admit("b")
    s.schedule()
    s.release("a")
    assert s.schedule() == Plan(start="b", advance=("b", 4), decode=())


@given(
    events=st.lists(st.sampled_from(["admit", "step", "step", "release"]), max_size=60),
    num_layers=st.integers(1, 9),
    layers_per_step=st.integers(1, 9),
    max_running=st.integers(1, 4),
    max_waiting=st.integers(0, 3),
    picks=st.randoms(use_true_random=False),
)
def test_promises_hold_for_any_order_of_events(
    events, num_layers, layers_per_step, max_running, max_waiting, picks
):
    s = scheduler(
        num_layers=num_layers,
        layers_per_step=layers_per_step,
        max_running=max_running,
        max_waiting=max_waiting,
    )
    alive: list[str] = []
    started: list[str] = []
    layers: dict[str, int] = {}
    for number, event in enumerate(events):
        if event == "admit":
            if len(alive) == max_running + max_waiting:
                with pytest.raises(EngineError, match="at most"):
                    s.admit(str(number))
            else:
                s.admit(str(number))
                alive.append(str(number))
        elif event == "release" and alive:
            gone = picks.choice(alive)
            alive.remove(gone)
            s.release(gone)
        elif event == "step":
            plan = s.schedule()
            if plan is None:
                assert not alive
                continue
            if plan.start is not None:
                started.append(plan.start)
                layers[plan.start] = 0
                assert plan.advance is not None
                assert plan.advance[0] == plan.start
            if plan.advance is not None:
                request_id, count = plan.advance
                assert request_id in alive
                assert 1 <= count <= layers_per_step
                layers[request_id] += count
                assert layers[request_id] <= num_layers
            # Who decodes has been prefilled, once each; who has been prefilled decodes.
            assert len(set(plan.decode)) == len(plan.decode)
            before = [r for r in alive if layers.get(r) == num_layers and (plan.advance or ("",))[0] != r]
            assert set(plan.decode) == set(before)
        assert s.num_running <= max_running
        assert s.num_running + s.num_waiting == len(alive)
    assert started == sorted(started, key=int), "first come, first served"
