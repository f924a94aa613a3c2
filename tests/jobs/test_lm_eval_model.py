"""lm-eval's own evaluation on our engines: fake ones for its ends and turns, real ones against the sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cluster.config import EngineConfig
from cluster.protocol import EngineError
from cluster.tokenizer import TextTokenizer
from jobs.lm_eval_model import ClusterLM, GenerationError
from jobs.reporting.summary import load
from jobs.sweep import main
from jobs.sweeping.spec import load_sweep
from jobs.tasks import get_task
from jobs.tasks.tokens import PlainTokens
from spts.errors import ConfigError, RequestError
from spts.methods import Dense, Method, Spts
from tests import fakes
from tests.cluster.tiny import CHAT_TEMPLATE, SCHEDULE
from tests.jobs.lm_eval_folder import TaskFolder
from tests.jobs.swept import SweptEngine

DENSE = Dense()
DEMO = Path(__file__).resolve().parents[2] / "jobs" / "demo_model"


@pytest.fixture
def start(monkeypatch, tiny_model):
    """Starts a ClusterLM on fake engines, which answer a prompt with that prompt again and again."""
    import ray

    import jobs.engines

    started: list[tuple[ClusterLM, list[SweptEngine]]] = []

    def start(*setups: dict[str, Any], method: Method = DENSE, in_flight: int = 1):
        setups = setups or ({},)
        engines = [SweptEngine(f"engine-{i}", **setup) for i, setup in enumerate(setups)]

        async def start_engines(config, count):
            assert count == len(engines)
            return engines, fakes.info(config)

        async def stop_engines(engines):
            for engine in engines:
                await engine.stop()

        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(jobs.engines, "check_capacity", lambda config, count: None)
        monkeypatch.setattr(jobs.engines, "start_engines", start_engines)
        monkeypatch.setattr(jobs.engines, "stop_engines", stop_engines)
        model = ClusterLM(
            EngineConfig(model=str(tiny_model)),
            method,
            engines=len(engines),
            in_flight=in_flight,
        )
        started.append((model, engines))
        return model, engines

    yield start
    for model, _ in started:
        model.close()


def ask(prompt: str, **kwargs: Any) -> Instance:
    return Instance(
        request_type="generate_until",
        doc={},
        arguments=(prompt, {"max_gen_toks": 30, **kwargs}),
        idx=0,
        metadata=("colours", 7, 1),
    )


def test_answers_end_as_lm_evals_other_models_end_them(start, tiny_model):
    from lm_eval.models.utils import postprocess_generated_text

    model, (engine,) = start()
    text = "the quick brown fox jumps over the lazy dog"
    endings: list[list[str]] = [[], ["fox"], ["lazy", " brown"], ["not there"], ["k b"], ["the"]]
    answers = model.generate_until([ask(text, until=until) for until in endings], disable_tqdm=True)
    for until, answer in zip(endings, answers, strict=True):
        ids = TextTokenizer(tiny_model).encode(text)
        whole = PlainTokens(TextTokenizer(tiny_model).tokenizer).decode((ids * 30)[:30])
        assert answer == postprocess_generated_text(whole, until, None)
    assert answers[5] == ""
    assert [len(request.token_ids) for request in engine.requests] == [len(ids)] * 6
    assert all(request.max_new_tokens == 30 for request in engine.requests)


def test_a_special_token_ends_an_answer_too(start):
    model, (engine,) = start()
    assert model.generate_until([ask("a fox<|end|>a dog", until=["<|end|>", "never"])]) == ["a fox"]
    assert engine.requests[0].sampling.stop_token_ids == (4,)
    assert engine.requests[0].sampling.temperature == 0


def test_all_engines_answer_at_once_and_the_order_is_kept(start, capsys):
    model, engines = start({"step_s": 0.002}, {"step_s": 0.002}, in_flight=2)
    prompts = [f"{'the hen ' * (1 + i % 5)}{i}" for i in range(24)]
    answers = model.generate_until([ask(prompt, max_gen_toks=60) for prompt in prompts], disable_tqdm=True)
    assert all(answer.startswith(prompt) for answer, prompt in zip(answers, prompts, strict=True))
    assert [engine.most_in_flight for engine in engines] == [2, 2]
    first = [len(engine.requests[0].token_ids) for engine in engines]
    assert first == [max(len(r.token_ids) for e in engines for r in e.requests)] * 2, "the longest go first"
    assert "24/24" not in capsys.readouterr().err
    model.generate_until([ask("again")])
    assert "1/1" in capsys.readouterr().err


FAULT = EngineError("unavailable", "died")


def test_an_engines_fault_is_tried_again_elsewhere(start):
    model, (lost, sound) = start({"script": [FAULT], "deaths_left": 0}, {"script": [None, FAULT]})
    prompts = [f"the dog {i}" for i in range(9)]
    answers = model.generate_until([ask(prompt) for prompt in prompts])
    assert all(answer.startswith(prompt) for answer, prompt in zip(answers, prompts, strict=True))
    assert len(lost.requests) == 1
    assert len(sound.requests) == 10
    assert len({request.request_id for request in lost.requests + sound.requests}) == 11


def test_what_has_no_answer_is_named_after_the_rest_is_done(start, tmp_path):
    late = EngineError("deadline", "late")
    model, (engine,) = start({"script": [None, late, None, late]})
    manager = TaskManager(include_path=str(made_folder(tmp_path).path), include_defaults=False)

    def evaluate():
        return lm_eval.simple_evaluate(
            model=model,
            tasks=["lamps"],
            task_manager=manager,
            bootstrap_iters=0,
            use_cache=str(tmp_path / "answers"),
        )

    with pytest.raises(
        GenerationError, match=r"got 2 of 6 without .*document \d of lamps: deadline: late; doc"
    ):
        evaluate()
    assert len(engine.requests) == 6
    evaluate()
    assert len(engine.requests) == 8, "with use_cache only what failed is asked again"


@pytest.mark.parametrize(
    ("script", "requests", "message"),
    [([FAULT] * 99, 3, "unavailable: died"), ([FAULT, FAULT], 2, "unavailable: no engine is left")],
)
def test_requests_that_no_engine_survives(start, script, requests, message):
    model, (engine,) = start({"script": script, "deaths_left": 99 if requests == 3 else 1})
    with pytest.raises(
        GenerationError, match=f"got 1 of 1 without an answer .document 7 of colours: {message}"
    ):
        model.generate_until([ask("the fox")])
    assert len(engine.requests) == requests


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"do_sample": True}, "generation_kwargs of document 7 of colours must mean greedy"),
    "long": ({"max_gen_toks": 510}, r"of 512 tokens, got \d+ \+ 510; leave it out"),
    "unknown": ({"min_tokens": 5}, "min_tokens must be one of until"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_before_any_is_sent(start, case):
    kwargs, message = BAD[case]
    model, (engine,) = start()
    with pytest.raises(ConfigError, match=message):
        model.generate_until([ask("a fox"), ask("the quick brown fox jumps over the lazy dog", **kwargs)])
    picture = ask("a fox")
    picture.arguments = (*picture.arguments, {"visual": []})
    with pytest.raises(ConfigError, match="must be text alone"):
        model.generate_until([picture])
    assert engine.requests == []


def test_likelihoods_are_refused(start):
    model, _ = start()
    for call in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="must be of type generate_until, got loglikelihood"):
            call([])


def test_a_method_that_the_model_cannot_run(start):
    with pytest.raises(ConfigError, match="num_layers"):
        start(method=Spts(schedule=type(SCHEDULE).preset("llama-3.1-8b")))


def made_folder(path: Path) -> TaskFolder:
    folder = TaskFolder(path / "tasks")
    folder.add("lamps")
    folder.add("begun", gen_prefix="It is")
    return folder


def evaluate_in_chat(model: ClusterLM, folder: TaskFolder, task: str = "lamps") -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=1,
        limit=2,
        task_manager=TaskManager(include_path=str(folder.path), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction="Be brief.",
    )


def test_chat_templates_are_the_models_own(start, tmp_path, tiny_model):
    model, (engine,) = start()
    folder = made_folder(tmp_path)
    results = evaluate_in_chat(model, folder)
    samples = {sample["doc_id"]: sample for sample in results["samples"]["lamps"]}
    sent = {tuple(request.token_ids) for request in engine.requests}
    for sample in samples.values():
        prompt = sample["arguments"][0][0]
        assert prompt.startswith("<|system|>Be brief.<|end|><|user|>")
        assert prompt.endswith("<|assistant|>")
        parts = prompt.removesuffix("<|assistant|>").split("<|end|>")[:-1]
        turns = [dict(zip(("role", "content"), part[2:].split("|>", 1), strict=True)) for part in parts]
        assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
        assert TextTokenizer(tiny_model).encode_chat(turns) in sent
    assert model.chat_template(True) == CHAT_TEMPLATE
    assert model.chat_template(False) is None
    assert model.tokenizer_name == f"fake-{'0' * 16}"
    assert results["config"]["method"] == DENSE.to_dict()
    with pytest.raises(ConfigError, match="must be off for a task with gen_prefix"):
        evaluate_in_chat(model, folder, "begun")
    with pytest.raises(ConfigError, match="must be true or false, got 'tools'"):
        model.chat_template("tools")


def test_a_model_without_a_chat_template(start, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("cluster.tokenizer.chat_template", lambda folder: None)
    model, _ = start()
    with pytest.raises(RequestError, match="must go through a chat template, got a model without one"):
        evaluate_in_chat(model, made_folder(tmp_path))


def needles(path: Path, length: int, count: int) -> TaskFolder:
    """Two lm-eval tasks over questions that the demo model answers, every third with another target."""
    folder = TaskFolder(path / "tasks")
    tokens = PlainTokens(TextTokenizer(DEMO).tokenizer)
    documents = []
    for index, sample in enumerate(get_task("single").samples(tokens, length=length, count=count, seed=3)):
        answer = sample.references[0]
        documents.append({"prompt": sample.prompt, "answer": answer[:-1] + "0" if index % 3 == 2 else answer})
    for split in ("test", "train"):
        folder.write_documents(split, documents)
    data = {"fewshot_split": None, "doc_to_text": "prompt", "doc_to_target": "answer"}
    folder.add("exact", **data)
    folder.add_scored("begins", **data)
    return folder


@pytest.mark.slow
@pytest.mark.real
def test_simple_evaluate_gives_what_the_sweep_gives(tmp_path, write_config):
    """Two tasks, one with an exact and one with a graded metric: the same answers, scores and averages."""
    import ray

    length, count = 512, 8
    folder = needles(tmp_path, length, count)
    data = {
        "name": "parity",
        "model": str(DEMO),
        "methods": [{"name": "spts", "schedule": {"preset": "demo-12l", "scaled": True}}],
        "tasks": [folder.entry("exact"), folder.entry("begins")],
        "lengths": [length],
        "samples": count,
        "output": str(tmp_path / "out"),
    }
    path = write_config(data)
    (spec,) = load_sweep(path).methods
    method = spec.at(num_layers=12, length=length)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="warning", log_to_driver=False)
    try:
        assert main(["--config", str(path)]) == 0
        with ClusterLM(EngineConfig(model=str(DEMO)), method, in_flight=2) as model:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=["exact", "begins"],
                task_manager=TaskManager(include_path=str(folder.path), include_defaults=False),
                bootstrap_iters=0,
            )
    finally:
        ray.shutdown()

    swept = load(tmp_path / "out").models[0]
    for name, metric in (("exact", "exact_match"), ("begins", "begins")):
        ours = {
            one.planned.meta["document"]: one for one in swept.scored if one.cell.task == f"lm_eval:{name}"
        }
        theirs = [sample for sample in results["samples"][name] if sample["filter"] == "word"]
        assert len(ours) == len(theirs) == count
        for sample in theirs:
            one = ours[sample["doc_id"]]
            assert one.row.text == sample["resps"][0][0]
            assert one.score == sample[metric]
        scores = [one.score for one in ours.values()]
        assert sum(scores) / count == pytest.approx(results["results"][name][f"{metric},word"], abs=1e-12)
        assert 0 < sum(scores) < count, "some are right and some are not: a mix-up would show"
    assert json.dumps(results["config"]["method"]) == json.dumps(method.to_dict())
