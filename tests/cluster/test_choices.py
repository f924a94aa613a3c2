"""The text of choices and its books: offsets, end tokens, usage chunk by chunk, limits by either name."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import TaskCancelledError

from tests.cluster.endpoint import CHAT, COMPLETIONS, chat, completion, endpoint, error_of, events
from tests.fakes import EOS

TEXT = "héllo 😀 fox"


async def test_offsets_say_where_in_the_text_a_token_begins(folder, tokenizer):
    ids = tokenizer.encode(TEXT)
    body = completion(prompt=TEXT, max_tokens=len(ids), logprobs=0)
    async with endpoint(folder) as (client, _):
        whole = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
        chunks = events(await client.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
    assert whole["text"] == TEXT
    offsets = whole["logprobs"]["text_offset"]
    # What is before a token is what its predecessors make, less the bytes that are no character yet.
    expected = [len(tokenizer.text(ids[:place]).rstrip("\ufffd")) for place in range(len(ids))]
    assert offsets == expected
    assert len(set(offsets)) < len(offsets), "the emoji takes several tokens"
    streamed = [o for chunk in chunks for o in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert streamed == offsets


async def test_the_end_token_may_be_ignored(folder, tokenizer):
    ids = [*tokenizer.encode("fox"), EOS]
    async with endpoint(folder) as (client, _):
        for ignore, tokens, reason in (
            (True, 50, "length"),
            (False, len(ids), "stop"),
            (None, len(ids), "stop"),
        ):
            body = completion(prompt=ids, max_tokens=50, ignore_eos=ignore)
            answer = (await client.post(COMPLETIONS, json=body)).json()
            assert answer["usage"]["completion_tokens"] == tokens
            assert answer["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("stop", ["<|end|>", ["lazy", "<|end|>"]])
@pytest.mark.parametrize("ignore_eos", [True, False])
async def test_a_stop_string_that_is_a_special_token_ends_the_answer_at_it(
    folder, tokenizer, stop, ignore_eos
):
    """Special tokens have no text in an answer, so no text of it could match."""
    [end] = tokenizer.special_ids(["<|end|>"])
    ids = [*tokenizer.encode("the fox "), end, *tokenizer.encode("and")]
    body = completion(prompt=ids, max_tokens=50, stop=stop, ignore_eos=ignore_eos)
    async with endpoint(folder) as (client, _):
        whole = (await client.post(COMPLETIONS, json=body)).json()
        *chunks, end_of_stream = events(await client.post(COMPLETIONS, json={**body, "stream": True}))
        other = (await client.post(COMPLETIONS, json={**body, "stop": "<|user|>"})).json()
        in_text = (await client.post(COMPLETIONS, json={**body, "stop": ["fox", "<|end|>"]})).json()
    assert end_of_stream == "[DONE]"
    [choice] = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the fox ", "stop")
    assert whole["usage"]["completion_tokens"] == ids.index(end) + 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the fox "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert other["choices"][0]["finish_reason"] == "length", "another one than the answer has"
    assert (in_text["choices"][0]["text"], in_text["choices"][0]["finish_reason"]) == ("the ", "stop")


async def test_the_usage_so_far_may_come_with_every_chunk(folder):
    """What guidellm asks for."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat(stream=True, max_tokens=6, stream_options=options, ignore_eos=True, stop=None)
    async with endpoint(folder) as (client, _):
        *chunks, last, end = events(await client.post(CHAT, json=body))
    assert end == "[DONE]"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == last["usage"]["completion_tokens"] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}


@pytest.mark.parametrize(("path", "make"), [(COMPLETIONS, completion), (CHAT, chat)])
async def test_the_limit_has_two_names_that_may_not_disagree(folder, path, make):
    async with endpoint(folder) as (client, _):
        body = make()
        del body["max_tokens"]
        for limits in ({"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
            answer = (await client.post(path, json={**body, **limits})).json()
            assert answer["usage"]["completion_tokens"] == 3
        answer = await client.post(path, json={**body, "max_tokens": 3, "max_completion_tokens": 4})
        assert answer.status_code == 400
        assert error_of(answer)["param"] == "max_tokens"


async def test_null_is_as_good_as_nothing(folder):
    fields = ("stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "user")
    body = chat(**dict.fromkeys((*fields, "logprobs", "top_logprobs", "ignore_eos", "spts", "tools")))
    async with endpoint(folder) as (client, _):
        assert (await client.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize("num_chunks", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_whose_call_is_cancelled_beneath_it_is_no_end(
    folder, monkeypatch, stream, num_chunks
):
    """As Ray does while a client leaves: asyncio takes a cancelled child for one that has ended."""
    async with endpoint(folder) as (client, fake):
        generate = fake.generate

        async def cancelled(request):
            async for chunk in generate(request):
                if chunk.prefilled is None or num_chunks == 0:
                    raise asyncio.CancelledError
                yield chunk

        monkeypatch.setattr(fake, "generate", cancelled)
        answer = await client.post(COMPLETIONS, json=completion(stream=stream, n=2, seed=1, temperature=1))
        metrics = (await client.get("/metrics")).text
    begun = num_chunks > 0
    if stream and begun:
        *_, last = events(answer)
        error = last["error"]
    else:
        assert answer.status_code == 503
        error = error_of(answer)
    assert error["code"] == "unavailable"
    assert 'reason="internal"' not in metrics


async def test_a_client_that_serve_says_has_left_is_no_bug(folder, monkeypatch):
    async with endpoint(folder) as (client, fake):

        async def left(request):
            raise TaskCancelledError
            yield

        monkeypatch.setattr(fake, "generate", left)
        answer = await client.post(COMPLETIONS, json=completion())
        metrics = (await client.get("/metrics")).text
    assert answer.status_code == 400
    assert 'reason="internal"' not in metrics
