"""One stream read strictly: against another reader of the format, our own endpoint, and made-up faults."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from jobs.load.answer import Answer, refusal
from jobs.load.sse import EventStream, Fault
from tests.cluster.endpoint import CHAT, COMPLETIONS, chat, completion, endpoint
from tests.cluster.tiny import write_tokenizer

DONE = "[DONE]"
ERROR = {"error": {"message": "full", "type": "server_error", "param": None, "code": "overloaded"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path)
    return path


def events_of(parts: list[bytes]) -> list[str]:
    stream = EventStream()
    found = [event for part in parts for event in stream.feed(part)]
    stream.close()
    return found


def parts_of(body: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[a:b] for a, b in itertools.pairwise(places)]


lines = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)


@given(
    events=st.lists(st.lists(lines, min_size=1, max_size=3), max_size=5),
    newline=st.sampled_from(["\n", "\r\n"]),
    between=st.sampled_from(["", ": still here\n", "event: chunk\nid: 7\n", ":\n\n"]),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_any_cut_of_a_body_gives_the_events_that_openais_client_reads(events, newline, between, cuts):
    body = "".join(between + "".join(f"data: {line}\n" for line in event) + "\n" for event in events)
    raw = body.replace("\n", newline).encode()
    theirs = [event.data for event in SSEDecoder().iter_bytes(iter([raw])) if event.data]
    assert [event for event in events_of(parts_of(raw, cuts)) if event] == theirs


@pytest.mark.parametrize(
    "body", [b"<html>busy</html>\n\n", b'{"error": 1}\n', b"data: \xff\n\n", b"data: 1", b"data: 1\n", b"dat"]
)
def test_a_body_that_is_no_event_stream_is_a_fault(body):
    with pytest.raises(Fault):
        events_of([body])


def chunk(text: str = "", reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": text, "finish_reason": reason}],
        "usage": None,
        **fields,
    }


def usage(prompt: Any = 9, completion: Any = 3) -> dict[str, Any]:
    return chunk(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def read(*events: Any, chat: bool = False, max_tokens: int = 3) -> tuple[Answer, str]:
    """The answer made of these events, one second apart, and how it ended."""
    answer = Answer(chat=chat, max_tokens=max_tokens)
    for second, event in enumerate(events):
        text = event if isinstance(event, str) else json.dumps(event)
        answer.feed(f"data: {text}\n\n".encode(), float(second))
    return answer, answer.close()


def test_a_whole_answer():
    answer, outcome = read(chunk("a"), chunk(""), chunk("b"), chunk("", "length"), usage(), DONE)
    assert outcome == "complete"
    assert (answer.text, answer.finish_reason) == ("ab", "length")
    assert answer.times_s == [0, 2, 3], "a chunk without text is no token, the end is one"
    assert answer.usage == {"prompt_tokens": 9, "completion_tokens": 3}


def test_an_error_in_a_stream_is_an_answer_of_its_kind():
    answer, outcome = read(chunk("a"), ERROR)
    assert outcome == "error"
    assert answer.error == "full (overloaded)"


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "neither"),
        ([chunk("a")], "neither"),
        ([chunk("a", "stop"), usage()], "neither"),
        ([chunk("a"), DONE], "must follow a finish_reason"),
        ([chunk("a", "stop"), DONE], "must have the usage"),
        ([chunk("a", "stop"), chunk("b"), usage(), DONE], "may follow a finish_reason"),
        ([chunk("a", "stop"), usage(), DONE, DONE], "may follow the end"),
        ([chunk("a", "stop"), usage(), DONE, chunk("b")], "may follow the end"),
        ([ERROR, chunk("b")], "may follow the end"),
        ([{"error": {"message": "full"}}], "an error must be"),
        ([{"error": "full"}], "an error must be"),
        ([chunk("a"), chunk("b", "stop", id="cmpl-2"), usage(), DONE], "the stream's id"),
        ([chunk("a", "eos"), usage(), DONE], "finish_reason must be"),
        ([chunk(choices=[]), DONE], "a choice or the usage"),
        ([chunk(choices=[{"index": 1, "text": "a"}])], "choice 0"),
        ([chunk(choices=[{"index": 0, "text": None}])], "must have text"),
        ([chunk(choices=None)], "and choices"),
        ([chunk("a", "length"), usage(completion=2), DONE], "ends by length must have 3 tokens, got 2"),
        ([chunk("a", "stop"), usage(completion=4), DONE], "at most 3 tokens, got 4"),
        ([chunk("a", "stop"), usage(completion="3"), DONE], "prompt_tokens and completion_tokens"),
        (["{"], "JSON object"),
        (["[1]"], "JSON object"),
    ],
)
def test_whatever_is_not_a_whole_answer_is_a_fault(events, said):
    with pytest.raises(Fault, match=said):
        read(*events)


@pytest.mark.parametrize("method", ["dense", "spts"])
async def test_our_own_endpoint_passes(folder, method):
    extra = {"stream": True, "stream_options": {"include_usage": True}, "spts": {"method": method}}
    async with endpoint(folder) as (client, _):
        for path, body in ((COMPLETIONS, completion(**extra)), (CHAT, chat(**extra))):
            raw = (await client.post(path, json=body)).content
            answer = Answer(chat=path == CHAT, max_tokens=4)
            answer.feed(raw, 0.0)
            assert answer.close() == "complete"
            assert answer.text
            assert answer.usage is not None and answer.usage["spts"]["method"] == method
            with pytest.raises(Fault):
                Answer(chat=path != CHAT, max_tokens=4).feed(raw, 0.0)


async def test_our_own_refusals_are_in_form(folder):
    async with endpoint(folder, start=False) as (client, _):
        answer = await client.post(COMPLETIONS, json=completion())
        assert answer.status_code == 503
        outcome, message = refusal(503, answer.headers["Retry-After"], answer.content)
    assert outcome == "refused"
    assert "unavailable" in message
    async with endpoint(folder) as (client, _):
        answer = await client.post(COMPLETIONS, json=completion(best_of=3))
    assert refusal(answer.status_code, None, answer.content)[0] == "error"


@pytest.mark.parametrize(
    ("retry_after", "body"),
    [
        (None, json.dumps(ERROR).encode()),
        ("soon", json.dumps(ERROR).encode()),
        ("1", b"Service Unavailable"),
        ("1", b'{"detail": "busy"}'),
        ("1", b"\xff"),
    ],
)
def test_a_503_out_of_form_is_a_fault(retry_after, body):
    with pytest.raises(Fault):
        refusal(503, retry_after, body)
