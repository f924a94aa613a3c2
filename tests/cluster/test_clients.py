"""Clients from outside, as they come, against the endpoint as `make serve` runs it.

What lm-eval gets from the endpoint is compared with what transformers says to the same questions.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from jobs.tasks import get_task
from jobs.tasks.tokens import PlainTokens
from tests.cluster.conftest import KEY, REPOSITORY
from tests.jobs.lm_eval_folder import TaskFolder

pytestmark = [pytest.mark.slow, pytest.mark.real]
DEMO = str(REPOSITORY / "jobs" / "demo_model")
LENGTHS = (300, 700, 2000)


def needles(length: int, count: int) -> list[Any]:
    from tokenizers import Tokenizer

    tokens = PlainTokens(Tokenizer.from_file(f"{DEMO}/tokenizer.json"))
    return list(get_task("single").samples(tokens, length=length, count=count, seed=11))


@pytest.fixture
def sdk(demo_url):
    return openai.OpenAI(base_url=f"{demo_url}/v1", api_key=KEY, max_retries=0)


async def test_async_streams_at_once_say_what_one_after_the_other_say(demo_url, sdk):
    samples = [sample for length in LENGTHS for sample in needles(length, 3)]
    fields: dict[str, Any] = {"model": "spts-demo", "max_tokens": 12, "temperature": 0}
    alone = [sdk.completions.create(prompt=sample.prompt, **fields) for sample in samples]
    async with openai.AsyncOpenAI(base_url=f"{demo_url}/v1", api_key=KEY, max_retries=0) as client:

        async def stream(prompt: str) -> tuple[str, str, Any]:
            text, reason, usage = "", "", None
            options: Any = {"include_usage": True}
            chunks = await client.completions.create(
                prompt=prompt, stream=True, stream_options=options, **fields
            )
            async for chunk in chunks:
                for choice in chunk.choices:
                    text += choice.text
                    reason = choice.finish_reason or reason
                usage = chunk.usage or usage
            return text, reason, usage

        together = await asyncio.gather(*(stream(sample.prompt) for sample in samples))
        listed = [model.id async for model in client.models.list()]
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(
                prompt=needles(2000, 1)[0].prompt, **{**fields, "max_tokens": 8000}
            )
    assert listed == ["spts-demo"]
    assert refused.value.code == "context_length_exceeded"
    for sample, whole, (text, reason, usage) in zip(samples, alone, together, strict=True):
        choice = whole.choices[0]
        assert sample.references[0] in choice.text
        assert (text, reason) == (choice.text, choice.finish_reason)
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )
        assert usage.model_extra["spts"]["method"] == whole.usage.model_extra["spts"]["method"]


def test_a_key_that_is_wrong_is_openais_error(demo_url):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{demo_url}/v1", api_key="sk-no", max_retries=0).models.list()


def evaluate(model: str, folder: TaskFolder, task: str, **options: Any) -> list[dict[str, Any]]:
    """lm-eval's samples of one of the tasks in a folder."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder.path), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def served(demo_url: str, route: str) -> dict[str, Any]:
    return {
        "base_url": f"{demo_url}/v1/{route}",
        "model": "spts-demo",
        "tokenizer": DEMO,
        "max_length": 4096,
        "num_concurrent": 3,
        "max_retries": 1,
    }


class Reference:
    """The model through transformers alone, dense."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(DEMO)
        self.model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)

    def answer(self, text: str, num_tokens: int, stops: list[str]) -> str:
        """Greedy, up to the first stop string."""
        ids = self.tokenizer(text, return_tensors="pt")
        out = self.model.generate(**ids, max_new_tokens=num_tokens, do_sample=False)
        said = self.tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        return said[: min([said.find(stop) for stop in stops if stop in said], default=len(said))]

    def chat_text(self, turn: str) -> str:
        """A user's turn through the chat template."""
        messages = [{"role": "user", "content": turn}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def loglikelihood(self, context: str, continuation: str) -> float:
        """Of the continuation, nats."""
        ids = self.tokenizer(context + continuation).input_ids
        start = len(self.tokenizer(context).input_ids)
        with torch.inference_mode():
            logprobs_TV = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logprobs_TV[row, ids[row + 1]]) for row in range(start - 1, len(ids) - 1))


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> TaskFolder:
    """Six short questions that the model answers, read by the dense pool; the third has another target."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    made = TaskFolder(tmp_path / "tasks")
    documents = []
    for index, sample in enumerate(needles(400, 6)):
        right = sample.references[0]
        wrong = "amber" if right != "amber" else "copper"
        documents.append(
            {
                "prompt": sample.prompt,
                "turn": sample.prompt.removesuffix("\nAnswer:"),
                "answer": wrong if index == 2 else right,
                "choices": [f" {wrong}", f" {right}"],
            }
        )
    for split in ("test", "train"):
        made.write_documents(split, documents)
    return made


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_lm_eval_generates_through_the_endpoint(demo_url, folder, reference, chat):
    stops, num_tokens = ["\n", "."], 12
    folder.add(
        "asked",
        fewshot_split=None,
        doc_to_text="turn" if chat else "prompt",
        doc_to_target="answer",
        generation_kwargs={"until": stops, "max_gen_toks": num_tokens, "do_sample": False},
    )
    model, route = (
        ("local-chat-completions", "chat/completions") if chat else ("local-completions", "completions")
    )
    options = {"apply_chat_template": True} if chat else {}
    found = evaluate(model, folder, "asked", model_args=served(demo_url, route), **options)
    found = [sample for sample in found if sample["filter"] == "word"]
    assert len(found) == 6
    for sample in found:
        text = reference.chat_text(sample["doc"]["turn"]) if chat else sample["doc"]["prompt"]
        assert sample["resps"] == [[reference.answer(text, num_tokens, stops)]]
    assert [sample["exact_match"] for sample in found] == [1, 1, 0, 1, 1, 1]


def test_lm_eval_scores_choices_through_the_endpoint(demo_url, folder, reference):
    folder.add(
        "chosen",
        output_type="multiple_choice",
        fewshot_split=None,
        doc_to_text="prompt",
        doc_to_choice="choices",
        doc_to_target=1,
        target_delimiter="",
        generation_kwargs=None,
        filter_list=None,
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    found = evaluate("local-completions", folder, "chosen", model_args=served(demo_url, "completions"))
    assert len(found) == 6
    for sample in found:
        document = sample["doc"]
        said = [float(response[0]) for response in sample["filtered_resps"]]
        expected = [reference.loglikelihood(document["prompt"], each) for each in document["choices"]]
        assert said == pytest.approx(expected, abs=1e-3)
    assert [sample["acc"] for sample in found] == [1.0] * 6
