"""Whatever a client may send that cannot be answered: refused by name, in one shape, before any compute;
never a 500, never a hang, never another request's loss."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from pydantic import ValidationError

from cluster.api import CompletionBody, parse_body
from cluster.errors import ApiError
from cluster.tokenizer import TextTokenizer
from tests.cluster.endpoint import CHAT, COMPLETIONS, chat, completion, endpoint, error_of, events
from tests.cluster.tiny import SCHEDULE

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
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
        "messages",
        "unsupported_parameter",
        "messages.0.tool_calls must be one of role, content, name, got an unknown key",
    ),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": "x", "weight": None}]),
        "messages",
        "unsupported_parameter",
        "messages.0.weight must be one of",
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
    (COMPLETIONS, completion(spts={"method": "magic"}), "spts.method", "invalid_value", "one of dense, spts"),
    (COMPLETIONS, completion(spts={"methd": "dense"}), "spts.methd", "unsupported_parameter", "spts.methd"),
    (COMPLETIONS, completion(spts={"seed": -1}), "spts.seed", "invalid_value", "spts.seed must be greater"),
    (
        COMPLETIONS,
        completion(spts={"schedule": 3}),
        "spts.schedule",
        "invalid_value",
        "spts.schedule must be an object or a preset's name, got 3;",
    ),
    (COMPLETIONS, completion(spts=3), "spts", "invalid_value", "got 3"),
    (COMPLETIONS, completion(stop=[""]), "stop", "invalid_value", "stop must be at most 16"),
    (
        COMPLETIONS,
        completion(stream=True, stream_options={"include_usage": 3}),
        "stream_options.include_usage",
        "invalid_value",
        "got 3",
    ),
    (
        COMPLETIONS,
        completion(spts={"method": "spts", "schedule": {**SCHEDULE.to_dict(), "num_layers": 28}}),
        "spts.schedule.num_layers",
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


BUDGETS = [
    ("num_layers", "schedule"),
    ("first_skip_layer", "schedule"),
    ("recent_tokens", "schedule"),
    ("stages", "schedule"),
    ("last_layer", "stage"),
    ("active_tokens", "stage"),
    ("keep_tokens", "stage"),
]


@pytest.mark.parametrize(
    "value", ["-1", "-" + "9" * 400, "9" * 4000, "1e999", "NaN", "0.5", "true", '"16"', "{}", "[[]]"]
)
@pytest.mark.parametrize(("field", "of"), BUDGETS, ids=[field for field, _ in BUDGETS])
async def test_budgets_that_are_negative_or_no_counts_are_400(folder, field, of, value):
    schedule = json.loads(json.dumps(SCHEDULE.to_dict()))
    (schedule if of == "schedule" else schedule["stages"][0])[field] = "@"
    body = completion(spts={"method": "spts", "schedule": schedule})
    async with endpoint(folder) as (client, engine):
        steps = len(engine.group.steps)
        answer = await client.post(COMPLETIONS, content=json.dumps(body).replace('"@"', value))
        if (field, value) == ("keep_tokens", "9" * 4000):
            assert answer.status_code == 200, "more than the prompt has: dense, as the schedule says"
            return
        assert len(engine.group.steps) == steps
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"].startswith("spts.schedule.")
    assert field in error["message"]
    assert len(error["message"]) < 1500


@pytest.mark.parametrize("depth", range(100, 1000, 60))
@pytest.mark.parametrize("field", ["spts", "schedule", "stages", "prompt", "stop", "tools"])
async def test_no_depth_of_nesting_is_a_500(folder, field, depth):
    nested = "[" * depth + "]" * depth
    inner = {"schedule": "@"} if field == "schedule" else {"schedule": {**SCHEDULE.to_dict(), "stages": "@"}}
    spts = "@" if field == "spts" else {"method": "spts", **inner}
    body = completion(**({"spts": spts} if field in ("spts", "schedule", "stages") else {field: "@"}))
    async with endpoint(folder) as (client, _):
        answer = await client.post(COMPLETIONS, content=json.dumps(body).replace('"@"', nested))
    assert answer.status_code == 400, answer.text
    assert len(error_of(answer)["message"]) < 1500


DEEP = {
    "preset": {"preset": "@"},
    "density": {"preset": "demo-12l", "attention_density": "@"},
    "num_layers": {**SCHEDULE.to_dict(), "num_layers": "@"},
    "stages": {**SCHEDULE.to_dict(), "stages": ["@"]},
    "last_layer": {**SCHEDULE.to_dict(), "stages": [{"last_layer": "@", "active_tokens": 9}]},
}


@pytest.mark.parametrize("depth", [9, 960, 970, 980, 5000])
@pytest.mark.parametrize("schedule", DEEP.values(), ids=DEEP)
async def test_a_large_body_may_nest_its_schedule_no_deeper_than_a_small_one(folder, schedule, depth):
    """It is read in a thread, where Python's stack has more room than where the schedule is looked at."""
    body = json.dumps(completion(spts={"method": "spts", "schedule": schedule}))
    content = body.replace('"@"', "[" * depth + "]" * depth) + " " * 2**20
    async with endpoint(folder, engine={"max_model_len": 2**12}) as (client, _):
        answer = await client.post(COMPLETIONS, content=content)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert len(error["message"]) < 1100
    if depth < 960:
        assert error["param"] == "spts.schedule"
        assert "spts.schedule must be nested at most 8 levels deep, got {" in error["message"]


async def test_a_schedule_has_at_most_1000_stages(folder):
    stage = {"last_layer": 3, "active_tokens": 9}
    async with endpoint(folder) as (client, _):
        for num_stages, message in (
            (1000, "spts.schedule.stages[1].last_layer must be at least 4"),
            (1001, "spts.schedule.stages must be at most 1000 stages, got 1001;"),
            (10_000, "spts.schedule.stages must be at most 1000 stages, got 10000;"),
        ):
            schedule = {**SCHEDULE.to_dict(), "stages": [stage] * num_stages}
            body = completion(spts={"method": "spts", "schedule": schedule})
            answer = await client.post(COMPLETIONS, json=body)
            assert answer.status_code == 400
            assert message in error_of(answer)["message"]


async def test_a_long_name_is_not_repeated(folder):
    async with endpoint(folder) as (client, _):
        for body in (
            completion(model="m" * 9999),
            completion(spts={"method": "spts", "schedule": "m" * 9999}),
        ):
            message = error_of(await client.post(COMPLETIONS, json=body))["message"]
            assert len(message) < 300
            assert "got 'mmmm" in message


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("limit", "fits"), [(11, True), (12, True), (13, False)], ids=["L-1", "L", "L+1"])
async def test_the_context_is_exact_and_its_error_has_the_three_counts(folder, limit, fits, stream):
    body = completion(prompt=[7] * 500, max_tokens=limit, stream=stream)
    async with endpoint(folder) as (client, engine):
        steps = len(engine.group.steps)
        answer = await client.post(COMPLETIONS, json=body)
        if fits:
            if stream:
                assert events(answer)[-2]["choices"][0]["finish_reason"] == "length"
            else:
                assert answer.json()["usage"]["completion_tokens"] == limit
            return
        assert len(engine.group.steps) == steps
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "context_length_exceeded"
    assert "prompt + max_tokens must be at most the context of 512 tokens, got 500 + 13;" in error["message"]


async def test_the_context_is_exact_through_the_chat_template(folder, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox? " * 30}]
    length = len(tokenizer.encode_chat(messages))
    async with endpoint(folder) as (client, _):
        for limit, status in ((511 - length, 200), (512 - length, 200), (513 - length, 400)):
            answer = await client.post(CHAT, json=chat(messages=messages, max_tokens=limit))
            assert answer.status_code == status
            if status == 200:
                assert answer.json()["usage"]["total_tokens"] == length + limit
        assert f"got {length} + {513 - length};" in error_of(answer)["message"]


async def test_as_many_as_fit_is_one_at_least(folder, tokenizer):
    """Without a limit of its own: a prompt of one token less than the context gets a token, one that fills it
    is refused."""
    around = len(tokenizer.encode_chat([{"role": "user", "content": ""}]))
    async with endpoint(folder) as (client, _):
        for length, status in ((510, 200), (511, 200), (512, 400), (513, 400)):
            body = chat(messages=[{"role": "user", "content": "x" * (length - around)}])
            del body["max_tokens"]
            answer = await client.post(CHAT, json=body)
            assert answer.status_code == status, length
            if status == 200:
                assert answer.json()["usage"]["completion_tokens"] == 512 - length
            else:
                assert f"got {length} + 1;" in error_of(answer)["message"]


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_one_prompt_too_long_refuses_its_batch(folder, place):
    prompts = [[7] * 20, [8] * 20]
    prompts.insert(place, [9] * 509)
    async with endpoint(folder) as (client, engine):
        steps = len(engine.group.steps)
        answer = await client.post(COMPLETIONS, json=completion(prompt=prompts, max_tokens=4))
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
        assert len(engine.group.steps) == steps


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


async def test_a_wrong_method_is_told_the_right_one(folder):
    async with endpoint(folder) as (client, _):
        for method, path, allowed in (
            ("GET", COMPLETIONS, "POST"),
            ("DELETE", "/v1/models", "GET, HEAD"),
            ("PUT", "/v1/models/tiny", "GET, HEAD"),
            ("POST", "/health", "GET, HEAD"),
            ("PROPFIND", "/", "GET, HEAD"),
        ):
            answer = await client.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
            told = f"method must be {allowed.replace(', ', ' or ')}, got {method} {path};"
            assert told in error_of(answer)["message"]


async def test_probes_may_ask_without_wanting_the_body(folder):
    async with endpoint(folder) as (client, _):
        for path in ("/health", "/ready", "/v1/models", "/"):
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == ((await client.get(path)).status_code, b"")


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
        {"x" * 20_000: 1},
        {"spts": {"method": "x" * 20_000}},
        {"spts": {"method": "spts", "schedule": "x" * 20_000}},
        {"spts": {"method": "spts", "schedule": {"x" * 20_000: 1}}},
        {"spts": {"method": "spts", "schedule": {**SCHEDULE.to_dict(), "stages": "x" * 20_000}}},
    ],
    ids=[
        *("list", "nested list", "unsupported", "unsupported list", "text", "stop", "key"),
        *("method", "preset", "schedule's key", "stages"),
    ],
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


async def test_nothing_refused_harms_a_stream_beside_it(folder):
    rows = [(path, json.dumps(body).encode()) for path, body, *_ in BAD]
    rows += [
        (CHAT, b"{"),
        (COMPLETIONS, b"\xff\xfe"),
        (COMPLETIONS, b"[" * 50_000),
        (CHAT, b""),
        ("nothing", b""),
    ]
    rows += [(COMPLETIONS, json.dumps(completion(prompt=[7] * 600)).encode())]
    random.Random(0).shuffle(rows)
    body = completion(prompt="the lazy dog and the hen ", max_tokens=300, stream=True)
    async with endpoint(folder) as (client, engine):
        alone = events(await client.post(COMPLETIONS, json=body))
        engine.group.step_s = 0.003
        beside = asyncio.create_task(client.post(COMPLETIONS, json=body))
        refused = [await client.post(path, content=content) for path, content in rows]
        assert not beside.done()
        together = events(await beside)
    assert {answer.status_code for answer in refused} <= {400, 404}
    text = ["".join(chunk["choices"][0]["text"] for chunk in each[:-1]) for each in (alone, together)]
    assert text[0] == text[1]
    assert alone[-1] == together[-1] == "[DONE]"


async def unended_body():
    yield b'{"model": "tiny", '
    await asyncio.sleep(30)


async def test_a_body_that_does_not_end_is_408(folder):
    async with endpoint(folder, request_timeout_s=0.2) as (client, _):
        answer = await client.post(COMPLETIONS, content=unended_body())
    assert answer.status_code == 408
    assert error_of(answer)["type"] == "timeout_error"


async def test_a_client_that_leaves_in_its_body_is_no_bug(folder, caplog):
    sent: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async with endpoint(folder) as (client, _):
        scope = {
            "type": "http",
            "method": "POST",
            "path": f"/{COMPLETIONS.lstrip('/')}",
            "query_string": b"",
            "headers": [],
        }
        await client._transport.app(scope, receive, send)
        metrics = (await client.get("metrics")).text
    assert sent[0]["status"] == 400
    assert "failed" not in caplog.text
    assert 'request_failures_total{reason="internal"}' not in metrics
