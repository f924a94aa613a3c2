"""echo: the answer begins with the prompt; its log-probabilities are those of transformers' own forward."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.conftest import KEY
from tests.cluster.endpoint import COMPLETIONS, completion, endpoint, error_of, events
from tests.fakes import EOS

TEXT = "the héllo 😀 fox "


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_the_answer_begins_with_the_prompt(folder, tokenizer, logprobs):
    ids = list(tokenizer.encode(TEXT))
    async with endpoint(folder) as (client, _):
        for prompt in (TEXT, ids):
            body = completion(prompt=prompt, max_tokens=len(ids), echo=True, logprobs=logprobs, stop="fox")
            whole = (await client.post(COMPLETIONS, json=body)).json()
            choice = whole["choices"][0]
            assert choice["text"] == TEXT + TEXT[: TEXT.index("fox")]
            assert choice["finish_reason"] == "stop", "of the answer: stop strings do not end the prompt"
            assert whole["usage"]["prompt_tokens"] == len(ids)
            answered = whole["usage"]["completion_tokens"]
            chunks = events(await client.post(COMPLETIONS, json={**body, "stream": True}))[:-1]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
            if logprobs is None:
                assert choice["logprobs"] is None
                continue
            found = choice["logprobs"]
            assert {len(column) for column in found.values()} == {len(ids) + answered}
            assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
            assert None not in found["token_logprobs"][1:]
            offsets = found["text_offset"]
            assert offsets == sorted(offsets)
            assert offsets[len(ids)] == len(TEXT)


async def test_batches_choices_and_single_tokens(folder):
    async with endpoint(folder) as (client, _):
        body = completion(prompt=[[7], [8, 9, EOS]], n=2, echo=True, logprobs=0, max_tokens=2)
        choices = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [3, 3, 5, 5]


async def test_the_longest_echo_is_configured(folder):
    async with endpoint(folder, max_echo_tokens=10) as (client, _):
        for length, status in ((10, 200), (11, 400)):
            body = completion(prompt=[7] * length, echo=True, logprobs=1)
            answer = await client.post(COMPLETIONS, json=body)
            assert answer.status_code == status
        assert "at most 10 tokens, got 11" in error_of(answer)["message"]
        assert (await client.post(COMPLETIONS, json={**body, "logprobs": None})).status_code == 200


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_a_prompt_that_cannot_be_answered_is_not_echoed_either(folder, logprobs):
    """Nothing is sent before the first token, so the refusal has its status, streamed too."""
    async with endpoint(folder, engine={"max_running": 1, "max_waiting": 0}, step_s=0.002) as (client, _):
        first = asyncio.create_task(client.post(COMPLETIONS, json=completion(max_tokens=50)))
        await asyncio.sleep(0.03)
        body = completion(echo=True, logprobs=logprobs, stream=True)
        answer = await client.post(COMPLETIONS, json=body)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
        assert (await first).status_code == 200


@pytest.mark.slow
@pytest.mark.real
def test_log_likelihoods_are_those_of_transformers_through_lm_eval(demo_url, monkeypatch):
    """lm-eval's own client for completions, unmodified."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.cluster.conftest import REPOSITORY

    folder = str(REPOSITORY / "jobs" / "demo_model")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = LocalCompletionsAPI(
        base_url=f"{demo_url}/v1/completions",
        model="spts-demo",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        max_length=1024,
        num_concurrent=1,
        max_retries=1,
    )
    asked = [
        ("The code of falcon is amber.\n\nQuestion: What is the code of falcon?\nAnswer:", " amber"),
        ("The code of falcon is amber.\n\nQuestion: What is the code of falcon?\nAnswer:", " copper"),
        # lm-eval counts a context's last spaces and lines as the continuation's.
        ("def read(path):\n    with open(path) as file:", "\n        return file.read()"),
    ]
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=index)
        for index, arguments in enumerate(asked)
    ]
    found = client.loglikelihood(instances, disable_tqdm=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (context, continuation), (loglikelihood, greedy) in zip(asked, found, strict=True):
        ids = tokenizer(context + continuation).input_ids
        start = len(tokenizer(context).input_ids)
        with torch.inference_mode():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = range(start - 1, len(ids) - 1)
        expected = sum(float(logprobs_TV[row, ids[row + 1]]) for row in rows)
        assert loglikelihood == pytest.approx(expected, abs=1e-3)
        assert greedy == all(int(logprobs_TV[row].argmax()) == ids[row + 1] for row in rows)
    assert found[0][1]
    assert not found[1][1]
