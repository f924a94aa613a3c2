"""/tokenize and /detokenize, against transformers' tokenizer of the same folder."""

from __future__ import annotations

import threading

import pytest

from cluster.tokenizer import TextTokenizer
from tests.cluster.endpoint import COMPLETIONS, completion, endpoint, error_of

TEXT = "the quick brown fox, héllo 😀"


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


async def test_a_text_has_the_tokens_that_transformers_gives_it(folder, reference):
    async with endpoint(folder) as (client, _):
        answer = (await client.post("tokenize", json={"model": "tiny", "prompt": TEXT})).json()
        expected = reference(TEXT).input_ids
        assert answer == {
            "count": len(expected),
            "max_model_len": 512,
            "tokens": expected,
            "token_strs": None,
        }
        back = (await client.post("detokenize", json={"tokens": answer["tokens"]})).json()
        assert back == {"prompt": TEXT}
        used = (await client.post(COMPLETIONS, json=completion(prompt=TEXT))).json()["usage"]
        assert used["prompt_tokens"] == answer["count"]


@pytest.mark.parametrize("generation", [True, False, None])
async def test_messages_go_through_the_chat_template(folder, reference, generation):
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "the fox?"}]
    body = {"messages": messages, "add_generation_prompt": generation, "return_token_strs": True}
    async with endpoint(folder) as (client, _):
        answer = (await client.post("tokenize", json=body)).json()
    expected = reference.apply_chat_template(
        [{**messages[0], "role": "system"}, messages[1]],
        add_generation_prompt=generation is not False,
        tokenize=True,
        return_dict=False,
    )
    assert answer["tokens"] == expected
    assert "".join(answer["token_strs"]) == reference.decode(expected)


async def test_the_texts_of_tokens_are_made_beside_the_event_loop(folder, monkeypatch):
    token_text = TextTokenizer.token_text
    threads: list[int] = []

    def noted(self, token_id):
        threads.append(threading.get_ident())
        return token_text(self, token_id)

    monkeypatch.setattr(TextTokenizer, "token_text", noted)
    async with endpoint(folder) as (client, _):
        body = {"prompt": TEXT, "return_token_strs": True}
        answer = (await client.post("tokenize", json=body)).json()
    assert "".join(answer["token_strs"]).startswith("the quick brown fox")
    assert len(threads) == answer["count"]
    assert threading.get_ident() not in threads


async def test_special_tokens_are_added_as_asked(tmp_path):
    from tokenizers import Tokenizer, processors

    from tests.cluster.tiny import write_tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    async with endpoint(tmp_path) as (client, _):
        for asked, first in ((True, True), (None, True), (False, False)):
            body = {"prompt": "fox", "add_special_tokens": asked}
            tokens = (await client.post("tokenize", json=body)).json()["tokens"]
            assert (tokens[0] == 0) == first
        messages = {"messages": [{"role": "user", "content": "fox"}]}
        plain = (await client.post("tokenize", json=messages)).json()["tokens"]
        more = (await client.post("tokenize", json={**messages, "add_special_tokens": True})).json()["tokens"]
        assert more == [0, *plain]
        text = (await client.post("detokenize", json={"tokens": more})).json()["prompt"]
        assert text == "<|endoftext|><|user|>fox<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("path", "body", "param", "code", "message"),
    [
        ("tokenize", {}, "prompt", "invalid_value", "prompt or messages must be given, got neither"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt",
         "invalid_value", "got both"),
        ("tokenize", {"prompt": ["a"]}, "prompt", "invalid_value", "text"),
        ("tokenize", {"messages": []}, "messages", "invalid_value", "at least 1"),
        ("tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt",
         "invalid_value", "only be given with messages"),
        ("tokenize", {"messages": [{"role": "user", "content": "b"}], "tools": [{}]}, "tools",
         "unsupported_parameter", "must not be given"),
        ("tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template", "unsupported_parameter", "'x'"),
        ("tokenize", {"prompt": "a", "promt": "x"}, "promt", "unsupported_parameter", "unknown key"),
        ("detokenize", {}, "tokens", "invalid_value", "tokens must be given"),
        ("detokenize", {"tokens": "1"}, "tokens", "invalid_value", "valid list"),
        ("detokenize", {"tokens": [-1]}, "tokens", "invalid_value", "got -1"),
        ("detokenize", {"tokens": [298]}, "tokens", "invalid_value", "ids of the vocabulary, got 298"),
        ("detokenize", {"tokens": [10**30]}, "tokens", "invalid_value", "less than"),
        ("detokenize", {"tokens": [1.5]}, "tokens", "invalid_value", "valid integer"),
    ],
)  # fmt: skip  # a table
async def test_bad_fields_are_refused_by_name(folder, path, body, param, code, message):
    async with endpoint(folder) as (client, _):
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == (param, code)
    assert message in error["message"]


async def test_another_model_is_404_and_a_loading_one_503(folder):
    async with endpoint(folder, start=False) as (client, engine):
        assert (await client.post("tokenize", json={"prompt": "a"})).status_code == 503
        await engine.start()
        for path, body in (("tokenize", {"prompt": "a"}), ("detokenize", {"tokens": [5]})):
            assert (await client.post(path, json={**body, "model": "gpt-4"})).status_code == 404
            assert (await client.post(path, json={**body, "model": "tiny"})).status_code == 200
