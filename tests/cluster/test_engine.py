"""The engine's books, on fake ranks: streams, batching, deadlines, aborts, refusals, restarts. No Ray, no
model."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from dataclasses import replace

import pytest

from cluster import warm_up
from cluster.admission import demand
from cluster.config import EngineConfig
from cluster.protocol import Agreement, Chunk, EngineError, Request
from cluster.replicas import routing_stats
from spts import cost
from spts.errors import ConfigError
from spts.methods import Dense, Spts
from spts.sampling import Sampling
from spts.schedule import Schedule
from tests.cluster.tiny import SCHEDULE
from tests.fakes import EOS, MAX_CONTEXT, PEAK_BYTES, SHAPE, FakeEngine, info


def request(request_id="a", token_ids=(1, 2, 3), max_new_tokens=4, **fields) -> Request:
    return Request(
        request_id=request_id,
        token_ids=token_ids,
        method=fields.pop("method", Dense()),
        max_new_tokens=max_new_tokens,
        **fields,
    )


@contextlib.asynccontextmanager
async def started(*, step_s=0.0, **config):
    engine = FakeEngine(EngineConfig(model="fake", **config), step_s=step_s)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown()


async def collect(engine: FakeEngine, sent: Request) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(sent)]


async def drain(stream) -> None:
    async for _ in stream:
        pass


async def settled(engine: FakeEngine) -> None:
    """Until the ranks have been told to drop what is over."""
    for _ in range(200):
        if not engine._release:
            break
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.01)


async def test_a_stream_ends_with_its_result():
    async with started() as engine:
        chunks = await collect(engine, request())
    assert [chunk.token_ids for chunk in chunks] == [(1,), (2,), (3,), (1,)]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]
    assert [chunk.result is None for chunk in chunks] == [True, True, True, False]
    result = chunks[-1].result
    assert result is not None
    assert (result.token_ids, result.finish_reason, result.prompt_tokens) == ((1, 2, 3, 1), "length", 3)
    assert 0 <= result.queue_s <= result.ttft_s <= result.total_s
    assert result.total_s == pytest.approx(result.ttft_s + result.decode_s)
    assert result.kv_tokens == 3 * SHAPE.num_layers
    assert result.flops == result.dense_flops
    assert result.kv_bytes == result.dense_kv_bytes == 3 * SHAPE.num_layers * 2 * 2 * 16 * 4
    assert result.logprobs is None


async def test_a_result_counts_what_was_skipped():
    async with started() as engine:
        result = await engine.run(
            request(token_ids=tuple(range(1, 101)), method=Spts(schedule=SCHEDULE), max_new_tokens=1)
        )
    assert [work.attention_tokens for work in result.work] == [100, 100, 40, 40, 20, 30]
    assert result.kv_tokens == 330
    assert result.flops < result.dense_flops


async def test_the_end_token_and_asked_for_stop_tokens_end_an_answer():
    async with started() as engine:
        ended = await engine.run(request(token_ids=(5, EOS, 6), max_new_tokens=9))
        stopped = await engine.run(request(max_new_tokens=9, sampling=Sampling(stop_token_ids=(3,))))
    assert (ended.token_ids, ended.finish_reason) == ((5, EOS), "stop")
    assert (stopped.token_ids, stopped.finish_reason) == ((1, 2, 3), "stop")


async def test_logprobs_come_with_every_token_when_asked_for():
    async with started() as engine:
        chunks = await collect(engine, request(max_new_tokens=2, sampling=Sampling(logprobs=3)))
    assert all(chunk.logprobs is not None and len(chunk.logprobs[0].top) == 3 for chunk in chunks)
    assert chunks[-1].result is not None
    assert [entry.token_id for entry in chunks[-1].result.logprobs or ()] == [1, 2]


async def test_requests_run_together_and_each_gets_its_own_answer():
    async with started(max_running=8, step_s=0.001) as engine:
        answers = await asyncio.gather(
            *(engine.run(request(f"r{i}", token_ids=(i + 1, i + 2), max_new_tokens=12)) for i in range(6))
        )
        together = max(len(step.decode) for step in engine.group.steps)
    assert [answer.token_ids for answer in answers] == [(i + 1, i + 2) * 6 for i in range(6)]
    assert together >= 3


async def test_a_running_stream_gets_tokens_while_another_request_is_in_prefill():
    async with started(slice_tokens=64, step_s=0.001) as engine:
        first = asyncio.create_task(collect(engine, request("first", max_new_tokens=100)))
        while not any(step.decode for step in engine.group.steps):
            await asyncio.sleep(0.001)
        await engine.run(request("second", token_ids=(1, 2) * 200, max_new_tokens=1))
        await first
        slices = [
            step for step in engine.group.steps if step.advance is not None and step.advance[0] == "second"
        ]
    whole = cost.dense_flops(SHAPE, 400).total / cost.dense_flops(SHAPE, 64).total
    assert len(slices) == math.ceil(whole) > 6
    assert all(step.decode for step in slices)


async def test_leaving_a_stream_frees_its_cache():
    async with started() as engine:
        stream = engine.generate(request(max_new_tokens=400))
        async for _ in stream:
            break
        await stream.aclose()
        await settled(engine)
        assert engine.group.ranks[0].num_cached == 0


async def test_the_deadline_covers_the_whole_answer_not_only_the_first_token():
    async with started(step_s=0.005) as engine:
        stream = engine.generate(request(max_new_tokens=400, deadline_s=0.2))
        assert (await anext(stream)).token_ids == (1,)
        with pytest.raises(EngineError, match=r"at most 0\.2 s") as late:
            await drain(stream)
        assert late.value.kind == "deadline"
        await settled(engine)
        assert engine.group.ranks[0].num_cached == 0


async def test_the_deadline_also_covers_the_queue():
    async with started(step_s=0.005, max_running=1) as engine:
        first = asyncio.create_task(collect(engine, request("first", max_new_tokens=60)))
        await asyncio.sleep(0.01)
        with pytest.raises(EngineError) as late:
            await engine.run(request("second", deadline_s=0.05))
        assert late.value.kind == "deadline"
        assert len(await first) == 60


async def test_a_full_queue_is_overloaded_and_the_others_are_answered():
    async with started(max_running=1, max_waiting=1, step_s=0.002) as engine:
        answers = await asyncio.gather(
            *(engine.run(request(f"r{i}")) for i in range(4)), return_exceptions=True
        )
    kinds = [answer.kind for answer in answers if isinstance(answer, EngineError)]
    assert kinds == ["overloaded", "overloaded"]


async def test_a_request_id_in_flight_is_refused():
    async with started(step_s=0.002) as engine:
        first = asyncio.create_task(engine.run(request()))
        await asyncio.sleep(0.005)
        with pytest.raises(EngineError, match="request_id must be unique, got 'a'"):
            await engine.run(request())
        await first


async def test_an_id_used_again_while_its_last_step_runs_gets_only_its_own_tokens():
    async with started(step_s=0.05) as engine:
        first = engine.generate(request(token_ids=(1, 2, 3)))
        pending = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0.02)  # its prefill is running
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        assert (await engine.run(request(token_ids=(7, 8, 9)))).token_ids == (7, 8, 9, 7)


async def test_a_stream_that_ends_late_leaves_the_request_that_has_its_id_by_now():
    async with started(step_s=0.001) as engine:
        old = engine.generate(request(max_new_tokens=1))
        assert (await anext(old)).result is not None
        new = asyncio.create_task(engine.run(request(token_ids=(7, 8, 9), max_new_tokens=50)))
        while "a" not in engine._flights:
            await asyncio.sleep(0)
        await old.aclose()
        assert (await asyncio.wait_for(new, 10)).token_ids[:4] == (7, 8, 9, 7)


async def test_a_request_is_finished_with_the_tokens_it_has_but_not_before_its_first():
    async with started(step_s=0.005) as engine:
        stream = engine.generate(request(max_new_tokens=400))
        first = asyncio.ensure_future(anext(stream))
        while not engine._flights:
            await asyncio.sleep(0)
        with pytest.raises(EngineError, match="has its first token, got 'a'"):
            await engine.finish("a")
        assert (await first).token_ids == (1,)
        await engine.finish("a")
        await engine.finish("a")
        *_, last = [chunk async for chunk in stream]
        assert last.result is not None
        assert (last.finish_reason, last.result.token_ids[:1]) == ("stop", (1,))
        await settled(engine)
        assert engine.group.ranks[0].num_cached == 0


async def test_a_followed_answer_is_what_was_given_and_only_its_length_ends_it():
    async with started() as engine:
        chunks = await collect(engine, request(token_ids=(1, 2), follow=(1, EOS, 1), max_new_tokens=3))
        await settled(engine)
        assert engine.group.ranks[0].num_cached == 0
        assert not any(step.decode for step in engine.group.steps)
    assert [chunk.token_ids for chunk in chunks] == [(1,), (EOS,), (1,)]
    result = chunks[-1].result
    assert result is not None
    assert (result.token_ids, result.finish_reason) == ((1, EOS, 1), "length")
    assert result.agreement == (
        Agreement(kl=0.0, rank=1),
        Agreement(kl=1.0, rank=2),
        Agreement(kl=0.0, rank=1),
    )


def test_what_is_followed_costs_a_run_over_all_of_it_and_a_dense_one_to_compare_with():
    """So that a prompt of one token with its whole text to follow, an echo, overtakes no shorter prompt. A
    dense one is compared with itself."""
    engine_info = info(EngineConfig(model="fake"))
    echo = demand(request(token_ids=(1,), follow=(2,) * 300, max_new_tokens=300), engine_info)
    assert echo.flops == pytest.approx(cost.dense_flops(SHAPE, 300).total, rel=0.01)
    sent = request(token_ids=(1,) * 200, follow=(2,) * 50, max_new_tokens=50)
    prompt, whole = (cost.dense_flops(SHAPE, num_tokens).total for num_tokens in (200, 249))
    needed = {}
    for method, runs in ((Dense(), 0), (Spts(schedule=SCHEDULE), 1)):
        once = demand(replace(sent, method=method, follow=()), engine_info)
        followed = demand(replace(sent, method=method), engine_info)
        assert followed.flops - once.flops == runs * whole + whole - prompt
        needed[method.name] = followed.kv_bytes
    assert needed["spts"] - needed["dense"] >= 50 * SHAPE.vocab_size * 4, "a second distribution"


async def test_tokens_to_follow_are_tokens_to_read():
    """An echo has a prompt of one token: what else there is to read counts wherever prompts do."""
    async with started(step_s=0.05, max_running=1, max_waiting=2, max_waiting_tokens=400) as engine:
        echoes = [request(name, (1,), follow=(2,) * 300, max_new_tokens=300) for name in "abc"]
        sent = []
        for echo in echoes[:2]:
            sent.append(asyncio.create_task(engine.run(echo)))
            await asyncio.sleep(0.01)
        assert (await engine.stats()).queued_prefill_tokens == 600
        with pytest.raises(EngineError, match="waiting must be at most 400, got 300 and 300 more"):
            await engine.run(echoes[2])
        await asyncio.gather(*sent)
    assert routing_stats(ready=True, queued=echoes)["queued"] == dict.fromkeys("abc", 300)


async def test_a_result_says_what_was_reused():
    async with started() as engine:
        first, then = [
            await engine.run(request(token_ids=(1, 2, 3, last), prefix_tokens=3)) for last in (4, 5)
        ]
    assert (first.reused_tokens, first.reused_flops) == (0, 0)
    assert then.reused_tokens == 3
    assert 0 < then.reused_flops < then.flops == first.flops


async def test_the_next_question_on_a_document_reuses_it_without_being_asked_to():
    document = tuple(range(1, 201))
    async with started() as engine:
        questions = [(*document, 280 + i, 7) for i in range(3)]
        first = await engine.run(request("first", questions[0]))
        rest = await asyncio.gather(*(engine.run(request(f"r{i}", questions[i])) for i in (1, 2)))
        skipping = await engine.run(request("spts", questions[1], method=Spts(schedule=SCHEDULE)))
        stats = await engine.stats()
        kept = [set(rank.documents) for rank in engine.group.ranks]
    assert first.reused_tokens == skipping.reused_tokens == 0
    assert [each.reused_tokens for each in rest] == [200, 200]
    assert [each.token_ids for each in rest] == [document[:4]] * 2
    # The dense document at all layers, and the other at the two before the first that skips, with its rows.
    row = 2 * 2 * 16 * 4
    assert stats.document_bytes == 201 * row * 6 + 201 * (row * 2 + 64 * 4)
    assert all(len(names) == 2 for names in kept)


async def test_what_is_kept_gives_way_to_requests_and_an_idle_engine_stays_within_its_limit():
    async with started(kv_cache_bytes=2**21, max_model_len=400, prefix_cache_bytes=2**19) as engine:
        for i in range(12):
            await engine.run(request("a", tuple((7 * i + place) % 297 + 1 for place in range(300))))
            stats = await engine.stats()
            assert stats.kv_bytes == stats.reserved_bytes == 0
            assert 0 < stats.document_bytes <= 2**19
            assert stats.kv_bytes_limit == 2**21
            assert len(engine.group.ranks[0].documents) == 1


async def test_an_engine_without_room_for_one_request_of_its_context_names_the_length_that_has():
    engine = FakeEngine(EngineConfig(model="fake", kv_cache_bytes=600_000))
    with pytest.raises(ConfigError, match=r"max_model_len must .* into the 600000 bytes") as refused:
        await engine.start()
    longest = int(str(refused.value).rsplit("at most ", 1)[1].split(",")[0])
    assert 2 < longest < MAX_CONTEXT
    async with started(kv_cache_bytes=600_000, max_model_len=longest) as engine:
        sent = request(token_ids=(1,) * (longest - 1), max_new_tokens=1)
        assert (await engine.run(sent)).token_ids == (1,)
    with pytest.raises(ConfigError, match=f"at most {longest}, or give the engine more memory"):
        await FakeEngine(
            EngineConfig(model="fake", kv_cache_bytes=600_000, max_model_len=longest + 1)
        ).start()


async def test_a_request_of_the_context_has_to_fit_under_the_pools_method_too():
    """Choosing among tokens in the last layer alone takes more than it saves."""
    schedule = Schedule.from_dict(
        {"num_layers": 6, "first_skip_layer": 5, "stages": [{"last_layer": 5, "active_tokens": 500}]}
    )
    sent = request(token_ids=(1,) * (MAX_CONTEXT - 1), max_new_tokens=1)
    dense, late = (
        demand(replace(sent, method=method), info(EngineConfig(model="fake"))).kv_bytes
        for method in (Dense(), Spts(schedule=schedule))
    )
    assert dense < late
    config = EngineConfig(model="fake", kv_cache_bytes=dense)
    await (engine := FakeEngine(config)).start()
    await engine.shutdown()
    with pytest.raises(ConfigError, match=rf"one spts request .*, which take {late};"):
        await FakeEngine(config, methods=[Spts(schedule=schedule)]).start()


async def test_a_request_that_needs_more_memory_than_there_is_gets_the_numbers():
    """Following tokens takes distributions over the vocabulary too, so it may not fit where a prompt does."""
    async with started(kv_cache_bytes=2**21, max_model_len=400) as engine:
        sent = request(token_ids=(1,) * 200, follow=(1,) * 200, max_new_tokens=200)
        needed = demand(sent, info(EngineConfig(model="fake"))).kv_bytes
        with pytest.raises(EngineError, match=rf"fit into 2097152 bytes .* got {needed} bytes") as refused:
            await engine.run(sent)
    assert (refused.value.kind, refused.value.param) == ("context_length_exceeded", "max_new_tokens")


async def test_requests_that_do_not_fit_together_wait_for_one_another():
    async with started(kv_cache_bytes=2**21, max_model_len=400, step_s=0.001) as engine:
        sent = [request(f"r{i}", (i + 1,) * 300, 20) for i in range(5)]
        running = [asyncio.create_task(engine.run(each)) for each in sent]
        most = 0
        while not all(each.done() for each in running):
            stats = await engine.stats()
            most = max(most, stats.running)
            assert stats.reserved_bytes + stats.document_bytes <= 2**21
            await asyncio.sleep(0.001)
    assert most < 5
    assert [each.result().token_ids for each in running] == [(i + 1,) * 20 for i in range(5)]


async def test_a_full_queue_says_when_to_come_back():
    async with started(max_running=1, max_waiting=0, step_s=0.01) as engine:
        first = asyncio.create_task(engine.run(request("first", (1,) * 300, 30)))
        await asyncio.sleep(0.02)
        with pytest.raises(EngineError) as refused:
            await engine.run(request("second"))
        await first
    assert refused.value.kind == "overloaded"
    assert 1 <= (refused.value.retry_after_s or 0) <= 60


async def test_two_hundred_random_aborts_leave_nothing_in_use():
    draw = random.Random(5)
    async with started(step_s=0.0005, slice_tokens=64, max_waiting=300) as engine:

        async def one(number: int) -> None:
            method = draw.choice([Dense(), Spts(schedule=SCHEDULE)])
            deadline_s = draw.choice([None, None, 0.01])
            shared = tuple(range(1, draw.choice([2, 90, 200])))
            sent = request(f"r{number}", (*shared, number + 1), 100, method=method, deadline_s=deadline_s)
            leaves_after = draw.choice([0, 0, 1, 3])
            stream = engine.generate(sent)
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(draw.random() * 0.3), contextlib.aclosing(stream):
                    async for _ in stream:
                        leaves_after -= 1
                        if leaves_after == 0:
                            break

        await asyncio.gather(*(one(number) for number in range(200)))
        assert engine._flights == {}
        await settled(engine)
        stats = await engine.stats()
        assert (stats.running, stats.waiting, stats.kv_bytes, stats.reserved_bytes) == (0, 0, 0, 0)
        assert (stats.held_requests, engine.group.ranks[0].num_cached) == (0, 0)
        assert stats.held_documents == len(engine.group.ranks[0].documents) > 0
        held = sum(
            cost.prefix_bytes(SHAPE, len(tokens), depth, dtype_bytes=4)
            for (depth, _), tokens in engine.group.ranks[0].documents.values()
        )
        assert 0 < stats.document_bytes <= held
        assert (await engine.run(request())).token_ids == (1, 2, 3, 1)


async def test_a_result_without_anything_to_follow_has_no_agreement():
    async with started() as engine:
        assert (await engine.run(request())).agreement is None


async def test_the_peak_of_memory_is_the_highest_of_the_steps_a_request_was_part_of():
    async with started(step_s=0.001, max_running=2) as engine:
        long = asyncio.create_task(engine.run(request("long", max_new_tokens=60)))
        while not any(step.decode for step in engine.group.steps):
            await asyncio.sleep(0.001)
        short = await engine.run(request("short", max_new_tokens=1))
        await settled(engine)
        await long
        alone = await engine.run(request("alone"))
    assert (short.peak_memory_bytes, long.result().peak_memory_bytes) == (2 * PEAK_BYTES, 2 * PEAK_BYTES)
    assert alone.peak_memory_bytes == PEAK_BYTES


DEEP = Schedule.dense(7)
OTHER_DEPTH = Spts(schedule=DEEP)


@pytest.mark.parametrize(
    ("sent", "kind", "param", "message"),
    [
        (request(token_ids=()), "invalid_request", "token_ids", "at least one token, got 0"),
        (request(token_ids=(1, 298)), "invalid_request", "token_ids", r"in 0..297, got 298 at index 1"),
        (request(token_ids=(-1,)), "invalid_request", "token_ids", "got -1 at index 0"),
        (request(max_new_tokens=0), "invalid_request", "max_new_tokens", "at least 1, got 0"),
        (request(max_new_tokens=-1), "invalid_request", "max_new_tokens", "got -1"),
        (
            request(token_ids=(1,) * 500, max_new_tokens=13),
            "context_length_exceeded",
            "max_new_tokens",
            r"context of 512 tokens, got 500 \+ 13;",
        ),
        (
            request(token_ids=(1,) * 512, max_new_tokens=1),
            "context_length_exceeded",
            "max_new_tokens",
            r"got 512 \+ 1;",
        ),
        (
            request(follow=(1, 2, 3), max_new_tokens=4),
            "invalid_request",
            "max_new_tokens",
            "must equal the number of tokens to follow, 3, got 4",
        ),
        (
            request(follow=(1, 298), max_new_tokens=2),
            "invalid_request",
            "follow",
            r"follow must be integers in 0..297, got 298 at index 1",
        ),
        (
            request(follow=(1,), max_new_tokens=1, sampling=Sampling(temperature=1.0)),
            "invalid_request",
            "sampling",
            "must be the default but for logprobs",
        ),
        (request(prefix_tokens=3), "invalid_request", "prefix_tokens", "below the prompt's 3 tokens, got 3"),
        (request(prefix_tokens=-1), "invalid_request", "prefix_tokens", "at least 0 and .* got -1"),
        (
            request(method=Spts(schedule=replace(SCHEDULE, first_skip_layer=1))),
            "invalid_request",
            "schedule",
            "in no layer before 2, the first with proxies, got layer 1;",
        ),
        (request(method=OTHER_DEPTH), "invalid_request", "schedule.num_layers", "model's 6 layers, got 7"),
    ],
)
async def test_what_cannot_be_computed_is_refused_before_any_compute(sent, kind, param, message):
    async with started() as engine:
        steps = len(engine.group.steps)
        with pytest.raises(EngineError, match=message) as refused:
            await engine.run(sent)
        assert (refused.value.kind, refused.value.param) == (kind, param)
        assert len(engine.group.steps) == steps


async def test_the_context_may_be_filled_to_the_last_token():
    async with started() as engine:
        result = await engine.run(request(token_ids=(1,) * (MAX_CONTEXT - 2), max_new_tokens=2))
    assert result.token_ids == (1, 1)


@pytest.mark.parametrize("kind", ["unavailable", "internal"])
async def test_a_failed_step_fails_what_is_in_flight_and_the_group_restarts(kind):
    async with started(step_s=0.001) as engine:
        flights = [asyncio.create_task(engine.run(request(f"r{i}", max_new_tokens=300))) for i in range(3)]
        await asyncio.sleep(0.05)
        engine.group.fail_next = EngineError(kind, "boom")
        failed = await asyncio.gather(*flights, return_exceptions=True)
        assert [getattr(error, "kind", None) for error in failed] == [kind] * 3
        while not await engine.ready():
            await asyncio.sleep(0.001)
        assert (await engine.run(request("after"))).token_ids == (1, 2, 3, 1)
        assert ((await engine.stats()).restarts, engine.group.num_starts) == (1, 2)
        assert await engine.ready()


async def test_a_rank_that_dies_while_nothing_runs_is_noticed():
    async with started() as engine:
        engine.group.lose_a_rank()
        for _ in range(100):
            if (await engine.stats()).restarts:
                break
            await asyncio.sleep(0.01)
        assert (await engine.stats()).restarts == 1
        assert (await engine.run(request())).token_ids == (1, 2, 3, 1)


async def test_ranks_that_start_again_are_ready_once_they_have_made_a_token():
    async with started() as engine:
        steps = len(engine.group.steps)
        engine.group.fail_next = EngineError("internal", "they load, and cannot compute")
        engine.group.lose_a_rank()
        while (await engine.stats()).restarts == 0:
            assert not await engine.ready() or engine.group.num_starts == 1
            await asyncio.sleep(0)
        assert await engine.ready()
        assert (engine.group.num_starts, (await engine.stats()).restarts) == (3, 1)
        first, then, _ = engine.group.steps[steps:]
        assert first.start == then.start
        assert then.advance is not None and then.advance[0] == "warm-up-0"
        assert engine.group.ranks[0].num_cached == 0


async def test_on_a_gpu_every_size_of_batch_has_run_before_the_first_request():
    async with started(device="cuda", max_running=6) as engine:
        steps = engine.group.steps
        assert [len(step.decode) for step in steps if step.decode] == [1, 2, 4, 6]
        assert len(steps[-1].release) == 6
        assert engine.group.ranks[0].num_cached == 0
        assert (await engine.run(request())).token_ids == (1, 2, 3, 1)


def test_prompts_in_slices_and_prompts_that_skip_are_warmed_up_with_where_there_is_room():
    roomy = replace(info(EngineConfig(model="fake", device="cuda")), max_context=40_000)

    def read(known):
        return [(sent.method.name, len(sent.token_ids)) for sent, _ in warm_up.prompts(known)]

    one, sliced = ("dense", 1), ("dense", 2304)
    assert read(roomy) == [one, sliced, ("spts", 512), ("spts", 512), ("spts", 32_896)]
    assert read(replace(roomy, first_proxy_layer=None)) == [one, sliced]
    assert read(replace(roomy, first_proxy_layer=6)) == [one, sliced]
    assert read(replace(roomy, max_context=1000)) == [one, ("spts", 512), ("spts", 512)]
    assert read(replace(roomy, kv_bytes_limit=300_000)) == [one]
    assert read(replace(roomy, device="cpu")) == [one]
    _, _, whole, sparse, _ = (sent.method.schedule_for(6) for sent, _ in warm_up.prompts(roomy))
    assert (whole.attention_density, sparse.attention_density < 1) == (1, True)
    for sent, _ in warm_up.prompts(roomy)[2:]:
        work = sent.method.planned_work(6, len(sent.token_ids))
        assert [each.candidates for each in work[-2:]] == [len(sent.token_ids), 64], "a cut too"
    (last,) = {sent.method for sent, _ in warm_up.prompts(replace(roomy, first_proxy_layer=5))[2:3]}
    assert [each.attention_tokens for each in last.planned_work(6, 512)[-2:]] == [512, 128]
    (_, flops) = warm_up.prompts(roomy)[1]
    assert flops is not None
    assert cost.rows_within(SHAPE, 0, 2304, flops) >= 1152, "two slices a layer"
    assert cost.rows_within(SHAPE, 1152, 1152, flops) == 1152


def test_a_model_with_hardly_any_context_is_not_asked_for_batches():
    known = info(EngineConfig(model="fake", device="cuda", max_model_len=4))
    assert warm_up.answers(known, 6) == ([], [])
    assert [len(sent.token_ids) for sent, _ in warm_up.prompts(known)] == [1]
    assert warm_up.answers(replace(known, max_context=8), 1)[1] == [1]


async def test_a_group_that_does_not_come_back_fails_the_engine_and_its_health_check():
    async with started(max_restarts=2) as engine:
        engine.group.fail_starts = 5
        engine.group.fail_next = EngineError("unavailable", "boom")
        with pytest.raises(EngineError):
            await engine.run(request())
        while engine.group.num_starts < 3:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="engine has failed"):
            await engine.check_health()
        with pytest.raises(EngineError, match="must be ready, got failed") as refused:
            await engine.run(request())
        assert refused.value.kind == "unavailable"


async def test_an_engine_that_cannot_start_says_why_and_leaves_nothing():
    engine = FakeEngine(EngineConfig(model="fake"))
    with pytest.raises(EngineError, match="loading"):
        await engine.info()
    engine.group.fail_starts = 1
    with pytest.raises(EngineError, match="no room"):
        await engine.start()
    assert engine.group.closed


async def test_an_engine_that_is_shut_down_while_it_starts_does_not_come_up(monkeypatch):
    engine = FakeEngine(EngineConfig(model="fake"))
    room, start = asyncio.Event(), engine.group.start

    async def start_late():
        await room.wait()
        return await start()

    monkeypatch.setattr(engine.group, "start", start_late)
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    await engine.shutdown()
    room.set()
    with pytest.raises(EngineError, match="shutting down"):
        await starting
    assert not await engine.ready()
    assert engine.group.ranks == []


async def test_a_shut_down_engine_fails_what_is_in_flight():
    engine = FakeEngine(EngineConfig(model="fake"), step_s=0.001)
    await engine.start()
    sent = asyncio.create_task(engine.run(request(max_new_tokens=300)))
    await asyncio.sleep(0.02)
    await engine.shutdown()
    with pytest.raises(EngineError, match="shutting down"):
        await sent


async def test_a_stalled_step_makes_it_not_ready_and_in_the_end_unhealthy():
    async with started(heartbeat_timeout_s=0.1, step_timeout_s=0.2) as engine:
        assert await engine.ready()
        await asyncio.sleep(0.3)  # nothing to do is no stall
        assert await engine.ready()
        engine.group.step_s = 0.6
        asking = asyncio.create_task(engine.run(request(max_new_tokens=1)))
        await asyncio.sleep(0.05)
        assert await engine.ready()
        await asyncio.sleep(0.12)
        assert not await engine.ready()
        await engine.check_health()
        await asyncio.sleep(0.25)
        with pytest.raises(EngineError, match="step loop stands still"):
            await engine.check_health()
        engine.group.step_s = 0.0
        await asking
        assert await engine.ready()
        await engine.check_health()


async def test_stats_count_what_runs_and_waits_and_end_at_nothing():
    token_bytes = 2 * 4 * SHAPE.num_kv_heads * SHAPE.head_dim * SHAPE.num_layers
    async with started(step_s=0.005, max_running=1, max_waiting=2) as engine:
        streams = [
            engine.generate(request(name, tuple(range(1, size)), 100))
            for name, size in (("a", 11), ("b", 21), ("c", 31))
        ]
        waiting = [asyncio.create_task(drain(stream)) for stream in streams[1:]]
        first = await anext(streams[0])
        stats = await engine.stats()
        assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (1, 2, 50)
        assert stats.kv_bytes == 11 * token_bytes
        assert first.queue_s is not None
        assert first.queue_s < 0.1
        assert (await anext(streams[0])).queue_s is None
        await streams[0].aclose()
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await settled(engine)
        stats = await engine.stats()
        assert (stats.running, stats.waiting, stats.queued_prefill_tokens, stats.kv_bytes) == (0, 0, 0, 0)


async def test_end_tokens_may_be_ignored():
    async with started() as engine:
        ids = (5, EOS, 6)
        assert len((await engine.run(request(token_ids=ids, max_new_tokens=9))).token_ids) == 2
        result = await engine.run(request(token_ids=ids, max_new_tokens=9, ignore_eos=True))
        assert (len(result.token_ids), result.finish_reason) == (9, "length")
