"""The OpenAI endpoint over HTTP on a fake engine, whose answer to a prompt is the prompt, over and over."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from pydantic import ValidationError

from cluster.api import CompletionBody, parse_body
from cluster.config import AppConfig
from cluster.errors import HTTP_ERRORS, ApiError
from cluster.protocol import ERROR_KINDS, EngineError
from cluster.router import Router
from cluster.tokenizer import TextTokenizer
from tests.cluster.endpoint import CHAT, COMPLETIONS, POOLS, chat, completion, endpoint, error_of, events
from tests.cluster.tiny import SCHEDULE, write_tokenizer
from tests.fakes import EOS, SHAPE, FakeEngine


async def test_health_ready_and_models(folder):
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


async def test_a_chat_fills_the_context_by_default(folder, tokenizer):
    body = chat(messages=[{"role": "user", "content": "fox " * 60}])
    del body["max_tokens"]
    async with endpoint(folder) as (client, _):
        answer = (await client.post(CHAT, json=body)).json()
    assert answer["usage"]["total_tokens"] == 512
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


async def test_n_choices_of_several_prompts_come_in_order(folder):
    async with endpoint(folder) as (client, _):
        body = completion(prompt=["the fox", "a hen"], n=2, max_tokens=2)
        whole = (await client.post(COMPLETIONS, json=body)).json()
        chunks = events(await client.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert whole["usage"]["completion_tokens"] == 8
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


BAD = [
    (COMPLETIONS, completion(spt={}), "spt", "unsupported_parameter", "spt must be one of model, "),
    (
        COMPLETIONS,
        completion(echo=True, spts={"method": "spts"}),
        "echo",
        "invalid_value",
        "do not depend on what is skipped",
    ),
    (COMPLETIONS, completion(echo=True, prompt=[7] * 51), "echo", "invalid_value", "dense, got spts"),
    (CHAT, chat(echo=True), "echo", "unsupported_parameter", "got True; this server"),
    (COMPLETIONS, completion(best_of=3), "best_of", "unsupported_parameter", "got 3"),
    (COMPLETIONS, completion(suffix="x"), "suffix", "unsupported_parameter", "got 'x'"),
    (
        COMPLETIONS,
        completion(logit_bias={"1": 2}),
        "logit_bias",
        "unsupported_parameter",
        "must not be given",
    ),
    (CHAT, chat(tools=[{"type": "function"}]), "tools", "unsupported_parameter", "must not be given"),
    (
        CHAT,
        chat(response_format={"type": "json_object"}),
        "response_format",
        "unsupported_parameter",
        "json_object",
    ),
    (CHAT, chat(presence_penalty=0.5), "presence_penalty", "unsupported_parameter", "got 0.5"),
    (CHAT, chat(messages=[]), "messages", "invalid_value", "at least 1"),
    (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), "messages", "invalid_value", "got 'tool'"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages",
        "unsupported_parameter",
        "image_url",
    ),
    (CHAT, chat(top_logprobs=2), "top_logprobs", "invalid_value", "logprobs = true, got 2; add logprobs"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "invalid_value", "stream = true"),
    (COMPLETIONS, completion(temperature=-1), "temperature", "invalid_value", "equal to 0, got -1"),
    (COMPLETIONS, completion(temperature="hot"), "temperature", "invalid_value", "valid number, got 'hot'"),
    (COMPLETIONS, completion(top_p=0), "top_p", "invalid_value", "greater than 0, got 0"),
    (COMPLETIONS, completion(n=0), "n", "invalid_value", "equal to 1, got 0"),
    (COMPLETIONS, completion(n=65), "n", "invalid_value", "prompts x n must be from 1 to 64, got 1 x 65"),
    (COMPLETIONS, completion(max_tokens=0), "max_tokens", "invalid_value", "equal to 1, got 0"),
    (COMPLETIONS, completion(stop=[""]), "stop", "invalid_value", "strings of 1 to 256"),
    (COMPLETIONS, completion(stop=3), "stop", "invalid_value", "a string or a list of strings, got 3"),
    (COMPLETIONS, completion(prompt=None), "prompt", "invalid_value", "text, token ids, or a list of either"),
    (COMPLETIONS, completion(prompt=["a", 3]), "prompt", "invalid_value", "text, token ids"),
    (COMPLETIONS, completion(prompt=""), "prompt", "invalid_value", "at least one token, got 0"),
    (COMPLETIONS, completion(prompt=[]), "prompt", "invalid_value", "at least one token, got 0"),
    (COMPLETIONS, completion(prompt=[1, 298]), "prompt", "invalid_value", "in 0..297, got 298"),
    (COMPLETIONS, completion(seed=1.5), "seed", "invalid_value", "valid integer, got 1.5"),
    (COMPLETIONS, completion(spts={"method": "magic"}), "method.name", "invalid_value", "one of dense, spts"),
    (COMPLETIONS, completion(spts={"methd": "dense"}), "spts", "unsupported_parameter", "spts.methd"),
    (
        COMPLETIONS,
        completion(spts={"method": "spts", "schedule": "qwen2.5-7b"}),
        "schedule.num_layers",
        "invalid_value",
        "model's 6 layers, got 28",
    ),
]


@pytest.mark.parametrize(("path", "body", "param", "code", "message"), BAD)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_bad_fields_are_refused_by_name_before_any_compute(
    folder, path, body, param, code, message, stream
):
    async with endpoint(folder) as (client, engine):
        steps = len(engine.group.steps)
        sent = body if "stream_options" in body else {**body, "stream": stream}
        answer = await client.post(path, json=sent)
        assert len(engine.group.steps) == steps
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert message in error["message"]


@pytest.mark.parametrize(("prompt", "limit", "fits"), [(500, 11, True), (500, 12, True), (500, 13, False)])
async def test_the_context_is_exact_and_its_error_has_the_three_counts(folder, prompt, limit, fits):
    async with endpoint(folder) as (client, _):
        answer = await client.post(COMPLETIONS, json=completion(prompt=[7] * prompt, max_tokens=limit))
    if fits:
        assert answer.json()["usage"]["completion_tokens"] == limit
        return
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "context_length_exceeded"
    assert "prompt + max_tokens must be at most the context of 512 tokens, got 500 + 13;" in error["message"]


async def test_a_chat_that_fills_the_context_is_refused_not_cut(folder):
    body = chat(messages=[{"role": "user", "content": "x" * 600}])
    del body["max_tokens"]
    async with endpoint(folder) as (client, _):
        answer = await client.post(CHAT, json=body)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_fields_that_ask_for_nothing_are_accepted(folder):
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": None,
        "user": "someone",
        "n": 1,
        "stop": None,
        "seed": None,
        "top_k": -1,
    }
    async with endpoint(folder) as (client, _):
        assert (
            await client.post(COMPLETIONS, json=completion(**neutral, echo=False, best_of=1))
        ).status_code == 200
        chat_body = chat(**neutral, tools=[], response_format={"type": "text"}, store=False)
        assert (await client.post(CHAT, json=chat_body)).status_code == 200


async def test_what_is_not_there_has_the_same_shape(folder):
    async with endpoint(folder) as (client, _):
        for answer, status, code in (
            (await client.post(COMPLETIONS, json=completion(model="gpt-4")), 404, "model_not_found"),
            (await client.get("v1/models/gpt-4"), 404, "model_not_found"),
            (await client.get("v1/nothing"), 404, "not_found"),
            (await client.get(COMPLETIONS), 405, "method_not_allowed"),
            (await client.post(COMPLETIONS, content=b"{"), 400, "invalid_value"),
            (await client.post(COMPLETIONS, content=b"[1]"), 400, "invalid_value"),
            (await client.post(COMPLETIONS, content=b"\xff"), 400, "invalid_value"),
            (await client.post(CHAT, json={"model": "tiny"}), 400, "invalid_value"),
        ):
            assert (answer.status_code, error_of(answer)["code"]) == (status, code)


async def test_a_body_larger_than_any_prompt_is_413(folder):
    async with endpoint(folder, max_prompts=1) as (client, _):
        await client.post(COMPLETIONS, json=completion())  # from now on the context is known
        answer = await client.post(COMPLETIONS, json=completion(prompt="x" * 100_000))
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "payload_too_large"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (COMPLETIONS, b"[" * 100_000, "must not be nested this deep"),
        (
            COMPLETIONS,
            b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "must not be nested this deep",
        ),
        (COMPLETIONS, b'{"model": "tiny", "prompt": "\\ud800"}', "surrogates not allowed"),
        (COMPLETIONS, b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', "must be JSON in UTF-8"),
        (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\uDFFF"}]}', "surrogates"),
        (
            COMPLETIONS,
            b'{"model": "tiny", "prompt": "a", "spts": {"method": "spts", "schedule": {"\\udbff": 1}}}',
            "surrogates",
        ),
    ],
    ids=["deep", "deep field", "half a pair", "half a pair in UTF-8", "in a chat", "in a key"],
)
async def test_json_that_cannot_be_text_is_400(folder, path, body, message):
    async with endpoint(folder) as (client, _):
        answer = await client.post(path, content=body)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize("prompt", ["\U0001f98a", "é", "\\ud800"], ids=["pair", "plain", "backslash"])
async def test_escapes_that_are_text_are_taken(folder, tokenizer, prompt):
    async with endpoint(folder) as (client, _):
        answer = await client.post(COMPLETIONS, content=json.dumps(completion(prompt=prompt)))
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1.5] * 20_000},
        {"prompt": [["a"]] * 20_000},
        {"suffix": "x" * 20_000},
        {"tools": [["x"] * 100] * 100},
        {"max_tokens": "9" * 20_000},
        {"stop": "x" * 20_000},
    ],
    ids=["list", "nested list", "unsupported", "unsupported list", "text", "stop"],
)
async def test_an_error_quotes_little_of_a_large_value(folder, fields):
    async with endpoint(folder) as (client, _):
        answer = await client.post(COMPLETIONS, json=completion(**fields))
    assert answer.status_code == 400
    assert len(error_of(answer)["message"]) < 1500


def test_a_long_list_is_checked_up_to_its_first_fault():
    body = json.dumps(completion(prompt=[["a"]] * 20_000)).encode()
    with pytest.raises(ApiError) as caught:
        parse_body(body, CompletionBody)
    assert isinstance(caught.value.__context__, ValidationError)
    assert caught.value.__context__.error_count() < 20


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "9" * 400, "-" + "9" * 400]
)
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "top_k", "seed", "n", "max_tokens", "logprobs", "spts.seed", "spts.activity"],
)
async def test_numbers_that_are_none_or_out_of_range_are_400(folder, field, number):
    spts = {"method": "random", field.partition(".")[2]: "@"} if "." in field else {"method": "dense"}
    body = completion(spts=spts) if "." in field else completion(**{field: "@"})
    async with endpoint(folder) as (client, engine):
        steps = len(engine.group.steps)
        answer = await client.post(COMPLETIONS, content=json.dumps(body).replace('"@"', number))
        if (field, number) in (("top_k", "-1"), ("seed", "-1")):
            assert answer.status_code == 200, "-1 is vLLM's word for no limit"
            return
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["param"] is not None
        assert len(engine.group.steps) == steps


@pytest.mark.parametrize("size", [10_000_000, 40_000_000])
async def test_bodies_of_megabytes_are_answered_and_harm_no_other(folder, size):
    async with endpoint(folder) as (client, _):
        other = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=200)))
        for content in (b"x" * size, json.dumps(completion(prompt="y" * size)).encode(), b"\xff" * size):
            answer = await client.post(COMPLETIONS, content=content)
            assert answer.status_code in (400, 413)
            error_of(answer)
        assert (await other).status_code == 200


async def test_a_text_far_over_the_context_is_413_before_its_tokens_are_counted(folder, monkeypatch):
    monkeypatch.setattr(TextTokenizer, "encode", lambda *_, **__: pytest.fail("it was counted"))
    text = "y " * 4097
    async with endpoint(folder) as (client, _):
        for path, body, param in (
            (COMPLETIONS, completion(prompt=text), "prompt"),
            (CHAT, chat(messages=[{"role": "user", "content": text}]), "messages"),
            ("tokenize", {"prompt": text}, "prompt"),
            ("tokenize", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, error_of(answer)["param"]) == (413, param)
            assert "at most 8192 characters, got 8194" in error_of(answer)["message"]


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
    async with endpoint(folder, step_s=0.002, engine={"max_running": 2, "max_waiting": 0}) as (
        client,
        engine,
    ):
        answer = await client.post(COMPLETIONS, json=completion(n=3, max_tokens=200))
        assert answer.status_code == 503
        await asyncio.sleep(0.1)
        assert engine.group.ranks[0].num_cached == 0


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


def test_every_kind_of_error_has_its_row():
    assert set(ERROR_KINDS) <= set(HTTP_ERRORS)
    assert {row.retry_after_s is not None for row in HTTP_ERRORS.values() if row.status == 503} == {True}
    assert isinstance(EngineError("deadline", "x"), Exception)
