"""The OpenAI endpoint over HTTP on a fake engine, whose answer to a prompt is the prompt, over and over."""

from __future__ import annotations

import asyncio
import importlib
import threading
from unittest.mock import MagicMock

import httpx
import openai
import pytest

from cluster.config import AppConfig
from cluster.errors import HTTP_ERRORS
from cluster.protocol import ERROR_KINDS, EngineError
from cluster.router import Router
from tests.cluster.endpoint import CHAT, COMPLETIONS, POOLS, chat, completion, endpoint, error_of, events
from tests.cluster.tiny import SCHEDULE, write_tokenizer
from tests.fakes import EOS, SHAPE, FakeEngine


async def test_health_ready_and_models(folder, monkeypatch):
    monkeypatch.setattr("cluster.dispatch.READY_AGE_S", 0)
    async with endpoint(folder) as (client, engine):
        assert (await client.get("health")).json() == {"status": "ok"}
        assert (await client.get("ready")).json() == {"ready": True, "engines": {"default": True}}
        models = (await client.get("v1/models")).json()
        assert [model["id"] for model in models["data"]] == ["tiny"]
        assert models["data"][0]["max_model_len"] == 512
        assert (await client.get("v1/models/tiny")).json()["id"] == "tiny"
        await engine.shutdown()
        assert (await client.get("health")).status_code == 200
        assert (await client.get("ready")).status_code == 503


async def test_many_that_ask_at_once_whether_it_is_ready_ask_the_engine_once(folder, monkeypatch):
    async with endpoint(folder) as (client, engine):
        ready = engine.ready
        asked: list[None] = []

        def counted():
            asked.append(None)
            return ready()

        monkeypatch.setattr(engine, "ready", counted)
        for answer in await asyncio.gather(*(client.get("ready") for _ in range(20))):
            assert answer.json() == {"ready": True, "engines": {"default": True}}
        assert len(asked) == 1
        monkeypatch.setattr("cluster.dispatch.READY_AGE_S", 0)
        await client.get("ready")
        assert len(asked) == 2


async def test_what_takes_long_to_read_is_read_beside_the_event_loop(folder, monkeypatch):
    threads: dict[str, set[int]] = {}

    def noting(module, name):
        function = getattr(importlib.import_module(module), name)

        def noted(*args):
            threads.setdefault(name, set()).add(threading.get_ident())
            return function(*args)

        monkeypatch.setattr(f"{module}.{name}", noted)

    noting("cluster.router", "parse_body")
    noting("cluster.dispatch", "check_request")
    own = {threading.get_ident()}
    async with endpoint(folder, engine={"max_model_len": 2**17}) as (client, _):
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200
        assert threads == {"parse_body": own, "check_request": own}
        threads.clear()
        answer = await client.post(COMPLETIONS, json=completion(prompt="x" * (2**21 + 1)))
        assert answer.status_code == 413
        assert threads["parse_body"].isdisjoint(own)
        answer = await client.post(COMPLETIONS, json=completion(prompt=[7] * 2**16 + [298]))
        assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")
        assert threads["check_request"].isdisjoint(own)


@pytest.mark.parametrize(("length", "beside"), [(2**15 - 1, False), (2**15, True)])
async def test_a_batchs_prompts_are_checked_together_and_each_once(folder, monkeypatch, length, beside):
    checked: list[tuple[int, ...]] = []
    threads: set[int] = set()
    check_request = importlib.import_module("cluster.dispatch").check_request

    def noted(request, info):
        checked.append(request.token_ids)
        threads.add(threading.get_ident())
        check_request(request, info)

    monkeypatch.setattr("cluster.dispatch.check_request", noted)
    prompts = [[7] * length, [8] * (length - 1) + [298]]  # no id of the vocabulary: nothing is computed
    async with endpoint(folder, engine={"max_model_len": 2**17}) as (client, _):
        answer = await client.post(COMPLETIONS, json=completion(prompt=prompts, n=3))
    assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")
    assert checked == [*map(tuple, prompts)]
    assert len(threads) == 1
    assert (threading.get_ident() not in threads) == beside


async def test_too_many_prompts_are_refused_before_any_is_encoded(folder, monkeypatch):
    async with endpoint(folder) as (client, _):
        encode = MagicMock(return_value=(1,))
        monkeypatch.setattr("cluster.tokenizer.TextTokenizer.encode", encode)
        answer = await client.post(COMPLETIONS, json=completion(prompt=["word"] * 65))
        assert (answer.status_code, encode.call_count) == (400, 0)
        assert "prompts x n must be from 1 to 64, got 65 x 1" in error_of(answer)["message"]


async def test_a_model_by_its_hub_id_is_served_without_its_weights_here(tmp_path, monkeypatch):
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 6}')
    async with endpoint("owner/name") as (client, _):
        answer = await client.post(COMPLETIONS, json=completion(prompt="the fox "))
    assert answer.status_code == 200
    assert asked
    assert "*.safetensors" not in asked


async def test_while_the_model_loads_the_router_is_alive_and_not_ready(folder):
    async with endpoint(folder, start=False) as (client, _):
        assert (await client.get("health")).status_code == 200
        assert (await client.get("ready")).status_code == 503
        answer = await client.post(COMPLETIONS, json=completion())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert error_of(answer)["code"] == "unavailable"


async def test_a_completion_and_its_usage(folder, tokenizer):
    ids = tokenizer.encode("the fox ")
    async with endpoint(folder) as (client, _):
        answer = (await client.post(COMPLETIONS, json=completion(max_tokens=len(ids)))).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "finish_reason": "length", "text": "the fox ", "logprobs": None}
    ]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), len(ids))
    assert usage["total_tokens"] == 2 * len(ids)
    kv_tokens = 6 * len(ids)
    assert usage["spts"] == {
        "method": "dense",
        "kv_tokens": kv_tokens,
        "kv_tokens_full": kv_tokens,
        "attention_density": 1.0,
        "skipped_share": 0.0,
        "flops_share": 1.0,
        "kv_bytes": usage["spts"]["kv_bytes_full"],
        "kv_bytes_full": 2 * 4 * SHAPE.num_kv_heads * SHAPE.head_dim * kv_tokens,  # K and V, float32
    }
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_16_tokens_by_default_as_in_the_openai_api(folder):
    body = completion()
    del body["max_tokens"]
    async with endpoint(folder) as (client, _):
        answer = (await client.post(COMPLETIONS, json=body)).json()
    assert answer["usage"]["completion_tokens"] == 16


async def test_a_chat_has_room_for_the_configured_answer_or_the_rest_of_the_context(folder):
    body = chat(messages=[{"role": "user", "content": "fox " * 60}])
    del body["max_tokens"]
    for configured, total in ({"default_max_tokens": 5}, None), ({}, 512):
        async with endpoint(folder, **configured) as (client, engine):
            answer = (await client.post(CHAT, json=body)).json()
            [sent] = [step.start for step in engine.group.steps if step.start is not None][1:]
        usage = answer["usage"]
        assert sent.max_new_tokens == usage["completion_tokens"]
        assert usage["total_tokens"] == (total or usage["prompt_tokens"] + 5)
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_pool_follows_the_exact_number_of_prompt_tokens(folder):
    async with endpoint(folder) as (client, _):
        usages = [
            (await client.post(COMPLETIONS, json=completion(prompt=[7] * length))).json()["usage"]["spts"]
            for length in (49, 50, 51, 100)
        ]
    assert [usage["method"] for usage in usages] == ["dense", "dense", "spts", "spts"]
    assert usages[3]["kv_tokens"] == 330
    assert usages[3]["kv_tokens_full"] == 600
    assert usages[3]["skipped_share"] == pytest.approx(0.45)
    assert 0 < usages[3]["flops_share"] < 1


async def test_usage_says_what_share_of_the_pairs_sparse_attention_has_read(folder):
    sparse = {**POOLS[1]["method"], "schedule": {**SCHEDULE.to_dict(), "attention_density": 0.1}}
    async with endpoint(folder, pools=[POOLS[0], {"method": sparse}]) as (client, _):
        usages = [
            (await client.post(COMPLETIONS, json=completion(prompt=[7] * length))).json()["usage"]["spts"]
            for length in (10, 384, 490)
        ]
    left_out = 106 * 128  # of the fourth block's queries, one of three earlier blocks
    assert [usage["attention_density"] for usage in usages[:2]] == [1.0, 1.0]
    assert usages[2]["attention_density"] == pytest.approx(1 - left_out / (490 * 491 / 2), abs=1e-6)


async def test_a_pool_may_have_an_engine_of_its_own(folder):
    engines = {name: {"model": str(folder)} for name in ("short", "long")}
    pools = [{**POOLS[0], "engine": "short"}, {**POOLS[1], "engine": "long"}]
    config = AppConfig.model_validate({"served_model_name": "tiny", "engines": engines, "pools": pools})
    fakes = {name: FakeEngine(engine) for name, engine in config.engines.items()}
    for fake in fakes.values():
        await fake.start()
    transport = httpx.ASGITransport(app=Router(config, fakes).app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test/") as client:
        before = {name: len(fake.group.steps) for name, fake in fakes.items()}
        await client.post(COMPLETIONS, json=completion(prompt=[7] * 51))
        assert len(fakes["short"].group.steps) == before["short"]
        assert len(fakes["long"].group.steps) > before["long"]
    for fake in fakes.values():
        await fake.shutdown()


@pytest.mark.parametrize(
    ("spts", "length", "method"),
    [
        ({"method": "dense"}, 100, "dense"),
        ({"method": "spts"}, 20, "spts"),
        ({"method": "random", "seed": 3}, 100, "random"),
        ({"method": "recency", "schedule": SCHEDULE.to_dict()}, 100, "recency"),
    ],
)
async def test_a_request_may_choose_its_method(folder, spts, length, method):
    async with endpoint(folder) as (client, _):
        answer = (await client.post(COMPLETIONS, json=completion(prompt=[7] * length, spts=spts))).json()
    assert answer["usage"]["spts"]["method"] == method
    assert (answer["usage"]["spts"]["kv_tokens"] == 330) == (length == 100 and method != "dense")


async def test_streamed_and_whole_answers_are_the_same(folder):
    body = completion(prompt="héllo 😀 ", max_tokens=12, logprobs=2)
    async with endpoint(folder) as (client, _):
        whole = (await client.post(COMPLETIONS, json=body)).json()
        streamed = await client.post(
            COMPLETIONS, json={**body, "stream": True, "stream_options": {"include_usage": True}}
        )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, end = events(streamed)
    assert end == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices][-1] == "length"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 12


async def test_a_chat_stream_begins_with_its_role_and_ends_with_its_reason(folder):
    async with endpoint(folder) as (client, _):
        chunks = events(await client.post(CHAT, json=chat(stream=True)))
    assert chunks.pop() == "[DONE]"
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


async def test_the_end_token_ends_the_answer_without_text(folder, tokenizer):
    ids = [*tokenizer.encode("fox"), EOS]
    async with endpoint(folder) as (client, _):
        answer = (await client.post(COMPLETIONS, json=completion(prompt=ids, max_tokens=50))).json()
    assert answer["choices"][0]["text"] == "fox"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize("stop", ["fox", ["lazy", "fox"], ["ox a", "fox"]])
async def test_a_stop_string_ends_the_answer_before_it_and_frees_the_engine(folder, stop):
    body = completion(prompt="the brown fox and ", max_tokens=100, stop=stop)
    async with endpoint(folder) as (client, engine):
        whole = (await client.post(COMPLETIONS, json=body)).json()
        chunks = events(await client.post(COMPLETIONS, json={**body, "stream": True}))
        await asyncio.sleep(0.05)
        assert engine.group.ranks[0].num_cached == 0
    assert whole["choices"][0]["text"] == (
        "the brown f" if "ox " in stop and "fox" not in stop else "the brown "
    )
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] < 20
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
    assert text == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("form", ["texts", "token ids"])
async def test_n_choices_of_several_prompts_come_in_order(folder, tokenizer, form):
    prompts: list = ["the fox", "a hen"]
    if form == "token ids":
        prompts = [list(tokenizer.encode(text)) for text in prompts]
    async with endpoint(folder) as (client, _):
        body = completion(prompt=prompts, n=2, max_tokens=2)
        whole = (await client.post(COMPLETIONS, json=body)).json()
        chunks = events(await client.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert ["the fox".startswith(texts[0]), "a hen".startswith(texts[2])] == [True, True]
    assert whole["usage"]["completion_tokens"] == 8
    assert whole["usage"]["prompt_tokens"] == len([*tokenizer.encode("the fox"), *tokenizer.encode("a hen")])
    for index, text in enumerate(texts):
        of_choice = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in of_choice) == text


async def test_sampling_fields_reach_the_engine_and_choices_have_seeds_of_their_own(folder):
    async with endpoint(folder) as (client, engine):
        body = completion(temperature=0.5, top_p=0.9, top_k=7, seed=11, n=2)
        await client.post(COMPLETIONS, json=body)
        await client.post(CHAT, json=chat())
        sent = [step.start.sampling for step in engine.group.steps if step.start is not None][1:]
    assert [(s.temperature, s.top_p, s.top_k, s.seed) for s in sent] == [
        (0.5, 0.9, 7, 11),
        (0.5, 0.9, 7, 12),
        (1.0, 1.0, 0, None),
    ]


async def test_chat_logprobs(folder):
    async with endpoint(folder) as (client, _):
        answer = (await client.post(CHAT, json=chat(logprobs=True, top_logprobs=2))).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == 4
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in entries)


async def test_a_full_engine_is_503_with_retry_after(folder):
    async with endpoint(folder, step_s=0.002, engine={"max_running": 1, "max_waiting": 0}) as (client, _):
        first = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=50)))
        await asyncio.sleep(0.03)
        for stream in (False, True):
            answer = await client.post(COMPLETIONS, json=completion(stream=stream))
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert error_of(answer)["code"] == "overloaded"
        assert (await first).status_code == 200


async def test_one_refused_choice_fails_the_request_and_frees_the_others(folder):
    async with endpoint(folder, step_s=0.002, engine={"max_running": 2, "max_waiting": 1}) as (
        client,
        engine,
    ):
        first = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=50)))
        await asyncio.sleep(0.03)
        answer = await client.post(COMPLETIONS, json=completion(n=3, max_tokens=200))
        assert answer.status_code == 503
        assert (await first).status_code == 200
        await asyncio.sleep(0.1)
        assert engine.group.ranks[0].num_cached == 0


@pytest.mark.parametrize(
    ("replicas", "most"),
    [({}, 3), ({"replicas": 2}, 6), ({"autoscaling": {"max_replicas": 3}}, 9)],
    ids=["one", "several", "autoscaled"],
)
async def test_a_batch_that_no_queue_ever_holds_is_not_to_be_sent_again(folder, replicas, most):
    async with endpoint(folder, engine={"max_running": 1, "max_waiting": 2, **replicas}) as (client, engine):
        steps = len(engine.group.steps)
        for batch, param in (({"n": most + 1}, "n"), ({"prompt": ["fox"] * (most + 1)}, "prompt")):
            answer = await client.post(COMPLETIONS, json=completion(**batch))
            assert answer.status_code == 400
            error = error_of(answer)
            assert (error["param"], error["code"]) == (param, "invalid_value")
            assert f"prompts x n must be at most {most}, which is all that engine default" in error["message"]
        assert len(engine.group.steps) == steps
        answer = await client.post(COMPLETIONS, json=completion(n=most))  # it may fit, though not into one
        assert answer.status_code == (200 if most == 3 else 503)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_is_408_or_an_error_in_the_stream(folder, stream):
    async with endpoint(folder, step_s=0.01, request_timeout_s=0.2) as (client, engine):
        answer = await client.post(COMPLETIONS, json=completion(max_tokens=400, stream=stream))
        await asyncio.sleep(0.1)
        assert engine.group.ranks[0].num_cached == 0
    if not stream:
        assert answer.status_code == 408
        assert error_of(answer)["type"] == "timeout_error"
        return
    *chunks, last = events(answer)
    assert last["error"]["type"] == "timeout_error"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


async def test_a_rank_that_dies_in_a_stream_is_an_error_in_the_stream_never_a_stop(folder):
    async with endpoint(folder, step_s=0.002) as (client, engine):
        sent = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=400, stream=True)))
        await asyncio.sleep(0.1)
        engine.group.lose_a_rank()
        *chunks, last = events(await sent)
        assert chunks
        assert last["error"]["code"] == "unavailable"
        assert "[DONE]" not in chunks
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        while not await engine.ready():
            await asyncio.sleep(0.001)
        assert (await client.post(COMPLETIONS, json=completion())).status_code == 200


async def test_a_bug_is_opaque_and_quotes_the_request_id(folder, monkeypatch):
    async with endpoint(folder) as (client, engine):
        monkeypatch.setattr(engine, "generate", lambda request: 1 / 0)
        answer = await client.post(COMPLETIONS, json=completion())
    assert answer.status_code == 500
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "division" not in error["message"]
    assert answer.headers["x-request-id"] in error["message"]


async def test_leaving_a_stream_frees_the_engine(folder):
    async with endpoint(folder, step_s=0.005) as (client, engine):
        sent = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=400)))
        await asyncio.sleep(0.1)
        sent.cancel()
        await asyncio.gather(sent, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert engine.group.ranks[0].num_cached == 0


async def test_the_openai_client_works_unmodified(folder):
    async with endpoint(folder) as (client, _):
        sdk = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client, max_retries=0)
        assert [model.id for model in (await sdk.models.list()).data] == ["tiny"]
        whole = await sdk.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_completion_tokens=3,
            extra_body={"spts": {"method": "dense"}},
        )
        assert whole.choices[0].message.role == "assistant"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        assert set(whole.usage.model_extra or {}) == {"spts"}
        stream = await sdk.completions.create(model="tiny", prompt="fox", max_tokens=3, stream=True)
        assert [chunk.choices[0].finish_reason async for chunk in stream][-1] == "length"
        with pytest.raises(openai.NotFoundError) as missing:
            await sdk.completions.create(model="gpt-4", prompt="fox")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await sdk.completions.create(model="tiny", prompt="fox", max_tokens=5000)
        assert long.value.code == "context_length_exceeded"


@pytest.mark.parametrize("nulls", [False, True], ids=["as it is", "with all nulls"])
async def test_an_answer_may_be_sent_back_as_a_turn_of_the_conversation(folder, nulls):
    """As the client's own guide has it: messages.append(answer.choices[0].message)."""
    async with endpoint(folder) as (client, engine):
        sdk = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client, max_retries=0)
        messages: list = [{"role": "user", "content": "hi"}]
        for _ in range(2):
            answer = await sdk.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
            message = answer.choices[0].message
            messages.append(message.model_dump() if nulls else message)
            messages.append({"role": "user", "content": "and?"})
        sent = [step.start for step in engine.group.steps if step.start is not None][1:]
    assert len(sent[1].token_ids) > len(sent[0].token_ids)


def test_every_kind_of_error_has_its_row():
    assert set(ERROR_KINDS) <= set(HTTP_ERRORS)
    assert {row.retry_after_s is not None for row in HTTP_ERRORS.values() if row.status == 503} == {True}
    assert isinstance(EngineError("deadline", "x"), Exception)
