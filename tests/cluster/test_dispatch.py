"""What a request may choose, and where it goes when its engine is lost: over HTTP, on fake engines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import time

import httpx
import pytest

from cluster.api import CompletionBody
from cluster.choices import pieces
from cluster.config import AppConfig
from cluster.dispatch import Dispatcher
from cluster.metrics import Metrics
from cluster.protocol import EngineError
from cluster.router import Router
from spts.methods import Spts
from tests.cluster.endpoint import CHAT, COMPLETIONS, POOLS, chat, completion, endpoint, error_of, events
from tests.cluster.tiny import SCHEDULE
from tests.fakes import FakeEngine, info


async def refused(client: httpx.AsyncClient, **fields) -> dict:
    answer = await client.post(COMPLETIONS, json=completion(**fields))
    assert answer.status_code == 400, answer.text
    return error_of(answer)


async def test_a_request_chooses_within_the_limits_of_the_configuration(folder):
    small = {**SCHEDULE.to_dict(), "stages": [{"last_layer": 3, "active_tokens": 15, "keep_tokens": 10}]}
    large = {**SCHEDULE.to_dict(), "stages": [{"last_layer": 3, "active_tokens": 20, "keep_tokens": 16}]}
    limits = {"allowed_methods": ["dense", "spts"], "min_budget_tokens": 16}
    async with endpoint(folder, **limits) as (client, engine):
        steps = len(engine.group.steps)
        for spts, param, message in (
            ({"method": "random"}, "method", "spts.method must be one of dense, spts, got 'random'"),
            ({"seed": 3}, "method", "spts.method must be given with a schedule or a seed, got null"),
            ({"method": "spts", "schedule": small}, "schedule", "at least 16 tokens, got 10 up to layer 3"),
        ):
            error = await refused(client, spts=spts)
            assert (error["param"], error["code"]) == (f"spts.{param}", "invalid_value")
            assert message in error["message"]
        assert len(engine.group.steps) == steps
        for spts in ({"method": "dense"}, {"method": "spts"}, {"method": "spts", "schedule": large}):
            assert (await client.post(COMPLETIONS, json=completion(spts=spts))).status_code == 200
    async with endpoint(folder, allowed_methods=[]) as (client, _):
        error = await refused(client, spts={"method": "dense"})
        assert "none: this server chooses by the prompt's length" in error["message"]
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200


@pytest.mark.parametrize(("limits", "most"), [({}, 40), ({"max_budget_tokens": 60}, 60)])
async def test_no_budget_of_a_request_is_larger_than_those_of_the_pools(folder, limits, most):
    """A prompt's length less one is no budget: a whole dense layer would be computed at once."""
    async with endpoint(folder, **limits) as (client, engine):
        for budget, status in ((most, 200), (most + 1, 400), (99, 400)):
            stages = [{"last_layer": 3, "active_tokens": budget, "keep_tokens": 200}]
            spts = {"method": "spts", "schedule": {**SCHEDULE.to_dict(), "stages": stages}}
            steps = len(engine.group.steps)
            answer = await client.post(COMPLETIONS, json=completion(prompt=[7] * 100, spts=spts))
            assert answer.status_code == status
            if status == 400:
                message = error_of(answer)["message"]
                assert f"active_tokens must be at most {most}, got {budget} up to layer 3" in message
                assert len(engine.group.steps) == steps
    dense = [{"method": {"name": "dense"}}]
    async with endpoint(folder, pools=dense) as (client, _):
        assert (await client.post(COMPLETIONS, json=completion(spts=spts))).status_code == 200


async def test_a_request_may_choose_the_density_of_attention(folder):
    async with endpoint(folder) as (client, engine):
        for density in (0.01, 0.5, 1):
            spts = {"method": "spts", "schedule": {**SCHEDULE.to_dict(), "attention_density": density}}
            assert (await client.post(COMPLETIONS, json=completion(spts=spts))).status_code == 200
            started = [step.start.method for step in engine.group.steps if step.start is not None]
            assert started[-1].schedule.attention_density == density
        for wrong, said in ((0, "0"), (1.5, "1.5"), ("0.5", "'0.5'")):
            spts = {"method": "spts", "schedule": {**SCHEDULE.to_dict(), "attention_density": wrong}}
            error = await refused(client, spts=spts)
            assert (
                f"attention_density must be a number above 0 and at most 1, got {said};" in error["message"]
            )


async def test_no_density_of_a_request_costs_more_than_dense_attention(folder):
    """What a pool's is, its operator knows."""
    sparse = {**SCHEDULE.to_dict(), "attention_density": 0.7}
    preset = {"preset": "demo-12l", "attention_density": 0.7}
    pools = [{"method": {"name": "spts", "schedule": sparse}}]
    async with endpoint(folder, pools=pools) as (client, _):
        for schedule in (sparse, preset, {**sparse, "attention_density": 0.501}):
            error = await refused(client, spts={"method": "spts", "schedule": schedule})
            assert error["param"] == "spts.schedule.attention_density"
            assert "attention_density must be at most 0.5, or 1, got 0." in error["message"]
        for spts in (None, {"method": "spts"}, {"method": "recency"}):
            assert (await client.post(COMPLETIONS, json=completion(spts=spts))).status_code == 200


async def test_what_a_choice_leaves_open_is_as_configured(folder):
    ablated = {**POOLS[1]["method"], "probe_tokens": 4}
    pools = [POOLS[0], {"method": ablated}]
    async with endpoint(folder, pools=pools) as (client, engine):
        await client.post(COMPLETIONS, json=completion(spts={"method": "spts"}))
        await client.post(COMPLETIONS, json=completion(spts={"method": "recency"}))
        await client.post(COMPLETIONS, json=completion(spts={"activity": 3}))
        chosen = [step.start.method for step in engine.group.steps if step.start is not None][1:]
    assert chosen[0] == Spts(schedule=SCHEDULE, probe_tokens=4)
    assert chosen[1].to_dict() == {"name": "recency", "schedule": SCHEDULE.to_dict()}
    assert chosen[2].name == "dense", "the pool's, for a prompt this short"


async def test_a_schedule_without_a_method_is_refused(folder):
    async with endpoint(folder) as (client, _):
        for spts in ({"schedule": SCHEDULE.to_dict()}, {"seed": 3}):
            assert "spts.method must be given" in (await refused(client, spts=spts))["message"]


async def test_activity_comes_with_the_usage_when_it_is_asked_for(folder):
    async with endpoint(folder) as (client, _):
        body = completion(prompt=[7] * 20, spts={"activity": 5})
        whole = (await client.post(COMPLETIONS, json=body)).json()["usage"]["spts"]["activity"]
        assert whole == {"bins": 5, "attention": [[100] * 5] * 6, "ffn": [[100] * 5] * 6}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage = events(await client.post(COMPLETIONS, json=body))[-2]["usage"]
        assert usage["spts"]["activity"] == whole
        short = (await client.post(CHAT, json=chat(spts={"activity": 512}))).json()["usage"]
        assert short["spts"]["activity"]["bins"] == short["prompt_tokens"] < 512
        for bins in (0, 513, "5"):
            error = await refused(client, spts={"activity": bins})
            assert error["param"] == "spts.activity"
            assert error["message"].startswith("spts.activity must")
        several = await refused(client, spts={"activity": 5}, n=2)
        assert "one choice of one prompt, got 1 x 2" in several["message"]


class LosesReplicas(FakeEngine):
    """Of several replicas, all ready, the first `num_lost` to be asked are lost, after `lost_after_s`."""

    num_lost = 0
    lost_after_s = 0.0

    async def generate(self, request):
        if self.num_lost:
            self.num_lost -= 1
            await asyncio.sleep(self.lost_after_s)
            raise EngineError("unavailable", "the engine is not there; retry later")
        async for chunk in super().generate(request):
            yield chunk


@contextlib.asynccontextmanager
async def two_engines(folder, pools, *, lengths=None, **engine):
    """lengths: max_model_len by engine."""
    lengths = lengths or {}
    engines = {
        name: {"model": str(folder), "max_model_len": lengths.get(name), **engine}
        for name in ("short", "long")
    }
    config = AppConfig.model_validate({"served_model_name": "tiny", "engines": engines, "pools": pools})
    fakes = {name: LosesReplicas(engine, step_s=0.002) for name, engine in config.engines.items()}
    for fake in fakes.values():
        await fake.start()
    transport = httpx.ASGITransport(app=Router(config, fakes).app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test/", timeout=30) as client:
        yield client, fakes
    for fake in fakes.values():
        await fake.shutdown()


SHORT_AND_LONG = [{**POOLS[0], "engine": "short"}, {**POOLS[1], "engine": "long"}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_without_a_token_yet_goes_to_another_engine_that_may_serve_it(folder, stream):
    async with two_engines(folder, SHORT_AND_LONG) as (client, fakes):
        fakes["short"].group.step_s = 5.0  # its prefill is on its way
        body = completion(stream=stream, max_tokens=3)
        sent = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await asyncio.sleep(0.2)
        assert not sent.done()
        fakes["short"].group.fail_starts = 99
        fakes["short"].group.lose_a_rank()
        answer = await sent
        assert answer.status_code == 200
        if not stream:
            assert answer.json()["usage"]["spts"]["method"] == "dense", "still the method of its own pool"
            assert answer.json()["usage"]["completion_tokens"] == 3
        else:
            assert events(answer)[-1] == "[DONE]"
        # From now on the lost engine is not asked in vain for each of them: it answers at once.
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("replicas", "num_lost", "status", "elsewhere"), [(2, 1, 200, 0), (2, 2, 503, 0), (1, 1, 200, 1)]
)
async def test_another_replica_is_asked_before_any_other_engine(
    folder, replicas, num_lost, status, elsewhere
):
    async with two_engines(folder, SHORT_AND_LONG, replicas=replicas) as (client, fakes):
        await client.get("ready")
        before = len(started(fakes["long"]))
        fakes["short"].num_lost = num_lost
        assert (await client.post(COMPLETIONS, json=completion())).status_code == status
        assert len(started(fakes["long"])) - before == elsewhere


def started(fake):
    return [step.start for step in fake.group.steps if step.start is not None]


async def test_a_long_prompt_does_not_go_to_the_engine_of_the_short_ones(folder):
    async with two_engines(folder, SHORT_AND_LONG) as (client, fakes):
        await client.get("ready")
        await fakes["long"].shutdown()
        answer = await client.post(COMPLETIONS, json=completion(prompt=[7] * 51))
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert error_of(answer)["code"] == "unavailable"
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200


async def test_it_is_tried_once_more_and_no_more(folder):
    async with two_engines(folder, SHORT_AND_LONG) as (client, fakes):
        await client.get("ready")
        for fake in fakes.values():
            fake.group.step_s = 5.0
        sent = asyncio.create_task(client.post(COMPLETIONS, json=completion()))
        for name in ("short", "long"):
            await asyncio.sleep(0.2)
            assert not sent.done()
            fakes[name].group.lose_a_rank()
        answer = await sent
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")


async def test_an_answer_that_has_begun_is_not_begun_again(folder):
    async with two_engines(folder, SHORT_AND_LONG) as (client, fakes):
        body = completion(stream=True, max_tokens=400)
        sent = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await asyncio.sleep(0.2)
        steps = len(fakes["long"].group.steps)
        fakes["short"].group.lose_a_rank()
        *chunks, last = events(await sent)
        assert chunks
        assert last["error"]["code"] == "unavailable"
        assert len(fakes["long"].group.steps) == steps


async def test_an_engine_that_loads_longer_than_others_is_waited_for_before_a_length_is_refused(
    folder, monkeypatch
):
    monkeypatch.setattr("cluster.dispatch.ANSWER_S", 0.2)
    lengths = {"short": 64, "long": 512}
    long_text = {"prompt": "fox " * 300, "max_tokens": 2}  # more than 16 characters a token of the short one
    async with two_engines(folder, SHORT_AND_LONG, lengths=lengths) as (client, fakes):
        loaded = asyncio.Event()
        info = fakes["long"].info

        async def loading():
            await loaded.wait()
            return await info()

        monkeypatch.setattr(fakes["long"], "info", loading)
        assert (await client.get("v1/models")).json()["data"][0]["max_model_len"] is None
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200, "of the short one"
        answer = await client.post(COMPLETIONS, json=completion(**long_text))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable")
        huge = completion(prompt="x" * (2**16 + 16 * 64 * 64))
        answer = await client.post(COMPLETIONS, json=huge)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "unavailable"), "it is not all read"
        assert "body must be at most 131072 bytes while an engine loads" in error_of(answer)["message"]
        loaded.set()
        assert (await client.post(COMPLETIONS, json=completion(**long_text))).status_code == 200
        assert (await client.get("v1/models/tiny")).json()["max_model_len"] == 512
        much = await client.post(COMPLETIONS, json=completion(prompt="x" * (16 * 512 + 1)))
        assert much.status_code == 413


@pytest.fixture
async def asked(folder, tokenizer):
    """A dispatcher of two engines, which answer `info` as the test has them."""
    engines = {name: {"model": str(folder)} for name in ("short", "long")}
    config = AppConfig.model_validate({"engines": engines, "pools": SHORT_AND_LONG})
    fakes = {name: FakeEngine(engine) for name, engine in config.engines.items()}
    return Dispatcher(config, fakes, tokenizer), fakes


async def test_the_first_engine_to_tell_is_enough_unless_all_are_waited_for(asked, monkeypatch):
    dispatcher, fakes = asked
    told = asyncio.Event()

    async def loading():
        await told.wait()
        return info(fakes["long"]._config)

    monkeypatch.setattr(fakes["long"], "info", loading)
    await fakes["short"].start()
    async with asyncio.timeout(1):
        assert await dispatcher.longest() is None, "the other one may take more"
    assert dispatcher.known_context == 512
    everyone = asyncio.create_task(dispatcher.longest(wait=True))
    await asyncio.sleep(0.05)
    assert not everyone.done()
    told.set()
    assert await everyone == 512
    await fakes["short"].shutdown()


async def test_an_engine_that_fails_first_does_not_hide_one_that_tells(asked, monkeypatch):
    dispatcher, fakes = asked

    async def late():
        await asyncio.sleep(0.05)
        return info(fakes["long"]._config)

    monkeypatch.setattr(fakes["long"], "info", late)  # the short one has not been started
    assert await dispatcher.longest() is None
    assert dispatcher.known_context == 512


async def test_engines_are_asked_in_no_requests_context(asked, monkeypatch):
    dispatcher, fakes = asked
    request_id = contextvars.ContextVar("request_id", default="none")
    seen: list[str] = []

    async def noting():
        seen.append(request_id.get())
        return info(fakes["short"]._config)

    for fake in fakes.values():
        monkeypatch.setattr(fake, "info", noting)
    request_id.set("of the first request")
    await dispatcher.longest(wait=True)
    assert seen == ["none", "none"]


async def test_a_question_that_is_cancelled_is_an_engine_that_is_not_there(asked, monkeypatch):
    dispatcher, fakes = asked

    async def cancelled():
        raise asyncio.CancelledError

    for fake in fakes.values():
        monkeypatch.setattr(fake, "info", cancelled)
    with pytest.raises(EngineError, match="retry later") as caught:
        await dispatcher.longest()
    assert caught.value.kind == "unavailable"
    monkeypatch.undo()
    await fakes["short"].start()
    assert await dispatcher.longest(wait=True) is None, "both are asked again"
    assert dispatcher.known_context == 512
    await fakes["short"].shutdown()


async def test_all_of_a_request_has_one_deadline_from_its_arrival(folder):
    async def slowly(body):
        text = json.dumps(body).encode()
        yield text[:10]
        await asyncio.sleep(0.2)
        yield text[10:]

    async with two_engines(folder, SHORT_AND_LONG) as (client, fakes):
        await client.get("ready")
        fakes["short"].num_lost = 1
        fakes["short"].lost_after_s = 0.1
        body = completion(echo=True, logprobs=0)
        assert (await client.post(COMPLETIONS, content=slowly(body))).status_code == 200
        [echo] = started(fakes["long"])[1:]
        [answer] = started(fakes["short"])[1:]
    assert 0 < answer.deadline_s <= echo.deadline_s <= 600 - 0.2 - 0.1


async def test_a_request_that_is_late_already_is_not_begun(folder, tokenizer):
    """Its body took all the time, or the reading of its text."""
    config = AppConfig.model_validate({"engines": {"default": {"model": str(folder)}}, "pools": POOLS})
    engine = FakeEngine(config.engines["default"])
    await engine.start()
    dispatcher = Dispatcher(config, {"default": engine}, tokenizer)
    body = CompletionBody.model_validate(completion(max_tokens=400))
    arrived = time.perf_counter() - config.request_timeout_s
    job = await dispatcher.job(body, [(7, 8, 9)], "completion", request_id="r", arrived=arrived)
    with pytest.raises(EngineError, match="the answer must take at most 600 s; it took longer"):
        await anext(pieces(job, tokenizer, Metrics()))
    await engine.shutdown()


@pytest.mark.parametrize(
    ("max_tokens", "length", "engine"),
    [(14, 50, "short"), (15, 50, "long"), (None, 48, "short"), (462, 50, "long"), (463, 50, None)],
)
async def test_an_answer_that_its_pools_engine_has_no_room_for_comes_from_a_later_one(
    folder, max_tokens, length, engine
):
    """A prompt of the short pool whose answer is long, of an engine with a context of 64."""
    async with two_engines(folder, SHORT_AND_LONG, lengths={"short": 64}) as (client, fakes):
        await client.get("ready")
        before = {name: len(started(fake)) for name, fake in fakes.items()}
        body = completion(prompt=[7] * length, max_tokens=max_tokens)
        answer = await client.post(COMPLETIONS, json=body)
        begun = [name for name, fake in fakes.items() if len(started(fake)) > before[name]]
    if engine is None:
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
        assert "the context of 64 tokens, got 50 + 463" in error_of(answer)["message"], "of its own pool"
    else:
        assert (answer.status_code, begun) == (200, [engine])
        assert answer.json()["usage"]["spts"]["method"] == {"short": "dense", "long": "spts"}[engine]


async def test_an_overloaded_engine_is_said_to_be_so_not_left(folder):
    pools = [{**POOLS[0], "engine": "short"}, {**POOLS[1], "engine": "long"}]
    async with two_engines(folder, pools) as (client, fakes):
        fakes["short"]._scheduler._max_running = fakes["short"]._scheduler._max_waiting = 0
        answer = await client.post(COMPLETIONS, json=completion())
        assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
