"""The search over fake engines: it finds a known optimum, keeps every engine busy, loses nothing."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.protocol import Agreement, EngineError, Request, Result
from jobs.sweeping.runner import EnginesLostError
from jobs.tuning.pool import Measured, Pool, Prompt
from jobs.tuning.search import Candidate, Goal, Search, TrialLog, front
from jobs.tuning.space import CostModel, Space
from spts.cost import ProxyShape, planned_work
from spts.methods import Dense, Spts
from spts.schedule import Schedule, Stage
from tests.jobs.test_schedule_space import DEMO, preset

LENGTH = 1000
PROMPTS = [
    Prompt(id=f"p{index}", task="t", token_ids=(index + 1,), follow=(7, 8), max_new_tokens=2)
    for index in range(3)
]
Quality = Callable[[Schedule], float]


def layer_six(schedule: Schedule) -> float:
    """KL of a model that looks at its context in layer 6 alone, and needs the last 16 tokens there."""
    active = planned_work(schedule, LENGTH)[6].attention_tokens
    return 1 - active / LENGTH + (0.5 if schedule.recent_tokens < 16 else 0.0)


def optimum(costs: CostModel, target: float) -> float:
    """The lowest KL at a cost: one stage up to layer 6, and a single token after it, by trying all budgets.
    Budgets do not grow, so layers 4 and 5 run as many."""
    for active in range(LENGTH, 0, -1):
        stage = Stage(last_layer=6, active_tokens=active, keep_tokens=1)
        if costs.speedup(Schedule(num_layers=12, first_skip_layer=4, stages=(stage,))) >= target:
            return 1 - active / LENGTH
    raise AssertionError("out of reach")


class FakeEngine:
    """Answers with a KL that follows from the schedule.

    script: errors to raise, one a request; None = answer. recovers: whether it serves again after an error.
    """

    def __init__(
        self,
        name: str = "engine-0",
        quality: Quality = layer_six,
        *,
        script: Sequence[EngineError | None] = (),
        recovers: bool = True,
    ) -> None:
        self.name = name
        self.requests: list[Request] = []
        self.busy = 0
        self._quality, self._script, self._recovers = quality, list(script), recovers

    async def run(self, request: Request, until: Callable[[int], bool] | None = None) -> Result:
        self.requests.append(request)
        self.busy += 1
        assert self.busy == 1, "one prompt at a time"
        await asyncio.sleep(0)
        self.busy -= 1
        if self._script and (error := self._script.pop(0)) is not None:
            raise error
        agreement = None
        if request.follow:
            assert isinstance(request.method, Spts)
            kl = self._quality(request.method.schedule)
            agreement = tuple(Agreement(kl=kl, rank=1 if kl < limit else 2) for limit in (0.1, 0.6))
        return Result(
            request_id=request.request_id,
            token_ids=request.follow or tuple(request.token_ids * request.max_new_tokens),
            finish_reason="length",
            prompt_tokens=len(request.token_ids),
            queue_s=0.0,
            ttft_s=0.0,
            decode_s=0.0,
            total_s=0.0,
            work=(),
            kv_tokens=0,
            kv_bytes=0,
            flops=0.0,
            dense_flops=0.0,
            dense_kv_bytes=0,
            agreement=agreement,
        )

    def forgive(self) -> None:
        """The pool gives no sample up."""

    async def recover(self) -> bool:
        return self._recovers


def space(target: float | None = 2.0) -> Space:
    costs = CostModel(shape=DEMO, proxy=ProxyShape(channels=64, rank=24), num_tokens=LENGTH)
    return Space(costs=costs, first_layer=4, target=target)


def make(folder: Path, *, num_trials: int, goal: Goal | None = None, identity: str = "a", **kwargs) -> Search:
    log = TrialLog(folder / "trials.jsonl", identity)
    target = None if goal is not None and goal.max_drop is not None else 2.0
    return Search(space(target), goal or Goal(), log, num_trials=num_trials, seed=0, **kwargs)


def run(search: Search, *engines: FakeEngine) -> Search:
    asyncio.run(Pool(engines=engines).measure(search.proposals(), PROMPTS, search.tell))
    return search


def test_it_finds_what_no_preset_knows(tmp_path):
    starts = [preset(name) for name in ("llama-3.1-8b", "qwen2.5-7b", "demo-12l")]
    search = run(make(tmp_path, num_trials=80, starts=starts), FakeEngine())
    best, costs = search.ranking[0], search.space.costs
    assert search.num_done == 80
    assert 2.0 <= best.speedup < 2.04
    bound = optimum(costs, 2.0)
    by_preset = [layer_six(space().schedule(space().point(start))) for start in starts]
    assert bound <= best.measured.mean_kl < bound + 0.1 < min(by_preset)
    assert best.measured.mean_kl == min(layer_six(each.schedule) for each in search.candidates)


def test_the_starts_are_measured_first(tmp_path):
    starts = [preset(name) for name in ("llama-3.1-8b", "demo-12l")]
    search = run(make(tmp_path, num_trials=3, starts=starts), FakeEngine())
    expected = [space().schedule(space().point(start)) for start in starts]
    assert [each.schedule for each in search.candidates][:2] == expected


def test_every_engine_measures_a_schedule_of_its_own(tmp_path):
    engines = [FakeEngine(f"engine-{index}") for index in range(3)]
    search = run(make(tmp_path, num_trials=9), *engines)
    assert [len(engine.requests) for engine in engines] == [9, 9, 9]  # three schedules on three prompts
    for engine in engines:
        schedules = [request.method for request in engine.requests]
        assert [len(list(group)) for _, group in itertools.groupby(schedules)] == [3, 3, 3]
        assert [request.token_ids for request in engine.requests] == [each.token_ids for each in PROMPTS] * 3
        assert {request.follow for request in engine.requests} == {(7, 8)}
    assert search.num_done == len(search.candidates) == 9


def test_a_repeated_search_goes_on_and_one_that_is_done_does_nothing(tmp_path):
    run(make(tmp_path, num_trials=6), FakeEngine())
    more = FakeEngine()
    search = run(make(tmp_path, num_trials=10), more)
    assert len(more.requests) == 4 * len(PROMPTS)
    idle = FakeEngine()
    again = run(make(tmp_path, num_trials=10), idle)
    assert idle.requests == []
    assert again.ranking == search.ranking
    assert again.candidates == search.candidates


def test_a_kill_loses_at_most_what_was_being_measured(tmp_path):
    starts = [preset("llama-3.1-8b"), preset("demo-12l")]
    died = EngineError("deadline", "late")
    engine = FakeEngine(script=[None] * 7 + [died])  # in the middle of the third schedule
    with pytest.raises(EngineError, match="late"):
        run(make(tmp_path, num_trials=4, starts=starts), engine)
    path = tmp_path / "trials.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    path.write_bytes(path.read_bytes()[:-30])  # and the second one's line was torn
    engine = FakeEngine()
    search = run(make(tmp_path, num_trials=4, starts=starts), engine)
    assert len(engine.requests) == 3 * len(PROMPTS)
    first, second, *_ = (each.schedule for each in search.candidates)
    assert [first, second] == [space().schedule(space().point(start)) for start in starts]
    assert path.read_bytes().count(b"\n") == 4


def test_other_searches_in_the_file_do_not_mix(tmp_path):
    run(make(tmp_path, num_trials=5), FakeEngine())
    other = run(make(tmp_path, num_trials=3, identity="b"), FakeEngine(quality=lambda schedule: 0.0))
    assert other.num_done == 3
    assert {each.measured.mean_kl for each in other.candidates} == {0.0}
    assert run(make(tmp_path, num_trials=5), FakeEngine()).num_done == 5


def test_a_schedule_that_comes_again_is_not_measured_again(tmp_path):
    start = preset("llama-3.1-8b")
    engine = FakeEngine()
    search = run(make(tmp_path, num_trials=3, starts=[start, start, start]), engine)
    assert (search.num_done, len(search.candidates), len(engine.requests)) == (3, 1, len(PROMPTS))
    assert make(tmp_path, num_trials=3).num_done == 3
    engines = [FakeEngine(), FakeEngine("engine-1")]  # the same, while the first is still being measured
    run(make(tmp_path / "..", num_trials=2, identity="c", starts=[start, start]), *engines)
    assert sum(len(engine.requests) for engine in engines) == len(PROMPTS)


def test_a_lost_engine_s_schedule_is_measured_by_another(tmp_path):
    lost = FakeEngine("lost", script=[None, EngineError("unavailable", "died")], recovers=False)
    well = FakeEngine("well")
    search = run(make(tmp_path, num_trials=4), lost, well)
    assert search.num_done == 4
    assert len(well.requests) == 4 * len(PROMPTS)


def test_an_engine_that_comes_back_tries_again(tmp_path):
    engine = FakeEngine(script=[EngineError("internal", "a hiccup"), EngineError("unavailable", "died")])
    search = run(make(tmp_path, num_trials=1), engine)
    assert search.num_done == 1
    assert len(engine.requests) == len(PROMPTS) + 2


@pytest.mark.parametrize(
    ("script", "recovers", "error"),
    [
        ([EngineError("unavailable", "died")], False, EnginesLostError),
        ([EngineError("internal", "broken")] * 3, True, EngineError),
        ([EngineError("invalid_request", "no proxies")], True, EngineError),
    ],
    ids=["lost", "broken for good", "refused"],
)
def test_what_cannot_be_measured_ends_the_search(script, recovers, error, tmp_path):
    with pytest.raises(error):
        run(make(tmp_path, num_trials=4), FakeEngine(script=script, recovers=recovers))


def test_prompts_without_a_text_to_follow_get_the_dense_model_s_answer():
    asked = [
        Prompt(id=f"q{index}", task="t", token_ids=(index,), follow=(), max_new_tokens=3)
        for index in range(5)
    ]
    engines = [FakeEngine(), FakeEngine("engine-1")]
    prompts = asyncio.run(Pool(engines=engines).answered([*asked, *PROMPTS]))
    assert [prompt.follow for prompt in prompts] == [(index,) * 3 for index in range(5)] + [(7, 8)] * 3
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in (*asked, *PROMPTS)]
    sent = [request for engine in engines for request in engine.requests]
    assert all(request.method == Dense() and request.max_new_tokens == 3 for request in sent)
    assert [len(engine.requests) for engine in engines] == [3, 2]


def test_with_a_drop_allowed_it_takes_the_fastest_that_keeps_it(tmp_path):
    goal = Goal(max_drop=0.5)
    search = run(make(tmp_path, num_trials=60, goal=goal), FakeEngine())
    best = search.ranking[0]
    assert goal.met(best)
    keeping = [each for each in search.candidates if each.measured.mean_agreement >= 0.5]
    assert best.speedup == max(each.speedup for each in keeping)
    # Half of the tokens agree where the KL is below 0.6. All dense up to layer 6 and nothing after it is 1.7.
    assert best.speedup > 1.4


def test_losses_put_what_keeps_the_drop_before_what_does_not():
    def loss(speedup: float, agreement: float) -> float:
        return Goal(max_drop=0.01).loss(speedup, Measured(agreement=(agreement,), kl=(0.0,)))

    ordered = [loss(3.0, 0.99), loss(2.0, 1.0), loss(1.0, 0.995), loss(3.0, 0.98), loss(9.0, 0.5)]
    assert ordered == sorted(ordered)


def test_the_front_is_what_nothing_beats():
    rng = random.Random(0)
    stage = Stage(last_layer=1, active_tokens=1)
    schedules = [
        Schedule(num_layers=2, first_skip_layer=0, stages=(stage,), recent_tokens=1) for _ in range(60)
    ]
    candidates = [
        Candidate(
            schedule=schedule,
            speedup=rng.randint(10, 30) / 10,
            measured=Measured(agreement=(1.0,), kl=(rng.randint(0, 30) / 10,)),
        )
        for schedule in schedules
    ]

    def beaten(one: Candidate) -> bool:
        return any(
            other.speedup >= one.speedup
            and other.measured.mean_kl <= one.measured.mean_kl
            and (other.speedup, other.measured.mean_kl) != (one.speedup, one.measured.mean_kl)
            for other in candidates
        )

    expected = sorted({(one.speedup, one.measured.mean_kl) for one in candidates if not beaten(one)})
    assert [(one.speedup, one.measured.mean_kl) for one in front(candidates)] == expected


def test_a_kept_prompt_shares_all_but_its_last_token_once_there_is_something_to_follow(tmp_path):
    long = (5, 6, 7, 8)
    asked = Prompt(id="q", task="t", token_ids=long, follow=(), max_new_tokens=2, kept=True)
    engine = FakeEngine()
    pool = Pool(engines=[engine])
    (prompt,) = asyncio.run(pool.answered([asked]))
    search = make(tmp_path, num_trials=1)
    asyncio.run(pool.measure(search.proposals(), [prompt, replace(prompt, kept=False)], search.tell))
    assert [request.prefix_tokens for request in engine.requests] == [0, 3, 0]
