"""Tasks of lm-eval in a sweep, against lm-eval itself: its `simple_evaluate` is the oracle of every prompt
and score."""

from __future__ import annotations

import json
from typing import Any

import lm_eval
import pytest
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from jobs.tasks import Sample, make_tasks
from jobs.tasks import lm_eval_source as source
from jobs.tasks.lm_eval import LmEvalTask
from spts.errors import ConfigError
from tests.jobs.lm_eval_folder import TaskFolder, documents


class Words:
    """Tokens that are words."""

    def count(self, text: str) -> int:
        return len(text.split())

    def encode(self, text: str) -> list[int]:
        raise AssertionError("lengths are all that these tasks ask for")

    def decode(self, token_ids: object) -> str:
        raise AssertionError


class Scripted(LM):
    """Answers the n-th prompt with the n-th answer, and remembers prompts and generation_kwargs."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self._answers = answers
        self.asked: list[Any] = []

    def generate_until(self, requests):
        self.asked = [request.args for request in requests]
        return self._answers[: len(requests)]

    def loglikelihood(self, requests):
        raise AssertionError

    loglikelihood_rolling = loglikelihood


ANSWERS = [" amber", "crimson", " jade. And", "no idea", "", " och!"]


@pytest.fixture
def folder(tmp_path) -> TaskFolder:
    return TaskFolder(tmp_path / "tasks")


def fresh() -> None:
    """As in a new process."""
    for cached in (source.load, source.config, source._index):
        cached.cache_clear()


def evaluate(folder: TaskFolder, task: str, *, count: int, answers=ANSWERS, **options: Any):
    """lm-eval's results and the prompts that it sent."""
    model = Scripted(answers)
    manager = TaskManager(include_path=str(folder.path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=[task], limit=count, task_manager=manager, bootstrap_iters=0, **options
    )
    return results, model.asked


def get_task(entry: dict[str, Any]) -> LmEvalTask:
    (task,) = make_tasks(entry)
    assert isinstance(task, LmEvalTask)
    return task


def samples(task: LmEvalTask, *, count: int = 6, length: int = 1000, seed: int = 0) -> list[Sample]:
    return list(task.samples(Words(), length=length, count=count, seed=seed))


@pytest.mark.parametrize("num_fewshot", [None, 3])
def test_prompts_and_endings_are_those_of_simple_evaluate(folder, num_fewshot):
    folder.add("lamps", description="Answer in one word.\n\n", num_fewshot=1, gen_prefix="It is")
    task = get_task(folder.entry("lamps", num_fewshot=num_fewshot))
    _, asked = evaluate(folder, "lamps", count=4, num_fewshot=num_fewshot)
    made = samples(task, count=4)
    assert [sample.prompt for sample in made] == [prompt for prompt, _ in asked]
    assert asked[0][1]["until"] == list(task.stop)
    assert asked[0][1]["max_gen_toks"] == task.max_new_tokens
    assert made[0].prompt.count("Answer:") == (num_fewshot or 1) + 1
    assert not any(sample.chat for sample in made)
    assert [sample.references for sample in made] == [(doc["answer"],) for doc in documents(4)]
    assert samples(task, count=2) == made[:2], "sample i is the same for any count"
    assert samples(task, count=99)[:4] == made, "there are no more than the data set holds"
    others = [sample.prompt for sample in samples(task, count=4, seed=1)]
    assert others != [sample.prompt for sample in made], "another seed, other examples"


@pytest.mark.parametrize("metric", [None, "exact_match", "exact_match,whole", "exact_match,word"])
def test_filters_and_scores_are_those_of_simple_evaluate(folder, metric):
    task = get_task(folder.entry(folder.add("lamps"), metric=metric))
    results, _ = evaluate(folder, "lamps", count=6)
    key = "exact_match," + ("whole" if metric == "exact_match,whole" else "word")
    scores = [
        task.score(answer, sample.references, sample.meta)
        for answer, sample in zip(ANSWERS, samples(task), strict=True)
    ]
    theirs = [one for one in results["samples"]["lamps"] if key.endswith(one["filter"])]
    assert scores == [one["exact_match"] for one in sorted(theirs, key=lambda one: one["doc_id"])]
    assert sum(scores) / len(scores) == results["results"]["lamps"][key]
    assert sum(scores) > 0 or key.endswith("whole")


def test_a_scorer_of_ones_own(folder):
    folder.add_scored("letters")
    task = get_task(folder.entry("letters"))
    results, _ = evaluate(folder, "letters", count=6)
    scores = [
        task.score(answer, sample.references, sample.meta)
        for answer, sample in zip(ANSWERS, samples(task), strict=True)
    ]
    whole = [one["begins"] for one in results["samples"]["letters"] if one["filter"] == "word"]
    assert scores == whole
    assert set(scores) - {0, 1}, "shares in between occur"
    assert task.content()["metric"] == "begins,word", "the first one that is better when higher"
    with pytest.raises(ConfigError, match="must be better when higher, got characters; choose among begins"):
        get_task(folder.entry("letters", metric="characters")).content()


def test_an_entry_gives_itself_back_and_groups_give_their_tasks(folder):
    for name in ("lamps", "lights", "beacons"):
        folder.add(name, tag="shining" if name != "lamps" else None)
    (folder.path / "all.yaml").write_text(
        json.dumps(
            {
                "group": "all",
                "task": [
                    "shining",
                    {"group": "inner", "task": ["lamps"]},
                    {"task": "lights", "task_alias": "x"},
                ],
                "aggregate_metric_list": [{"metric": "exact_match"}],
            }
        )
    )
    made = make_tasks(folder.entry("all", num_fewshot=2, metric="exact_match,whole"))
    assert [task.spec["tasks"][0] for task in made] == ["beacons", "lights", "lamps"]
    assert made[0].name == "lm_eval:beacons:2-shot:exact_match,whole"
    assert make_tasks(folder.entry("lamps"))[0].name == "lm_eval:lamps"
    for task in made:
        assert make_tasks(task.spec) == (task,)
        assert make_tasks(json.loads(json.dumps(task.spec))) == (task,)


def test_making_tasks_reads_no_data(folder):
    folder.add("lamps")
    (folder.path / "test.jsonl").unlink()
    (task,) = make_tasks(folder.entry("lamps"))
    assert (task.stop, task.max_new_tokens) == (("\n", "."), 12)
    with pytest.raises(ConfigError, match=r"lm-eval task 'lamps' must load with its data, got .*test.jsonl"):
        task.content()


def test_defaults_are_lm_evals(folder):
    folder.add("bare", generation_kwargs=None, metric_list=None, filter_list=None, fewshot_delimiter="###")
    task = get_task(folder.entry("bare"))
    assert (task.stop, task.max_new_tokens) == (("###",), 256)
    assert task.content()["metric"] == "exact_match,none"
    folder.add("ends", generation_kwargs={"until": "END", "max_new_tokens": 7})
    fresh()
    assert get_task(folder.entry("ends")).stop == ("END",)
    assert get_task(folder.entry("ends")).max_new_tokens == 7


def test_the_content_tells_what_can_change_a_result(folder):
    folder.add_scored("letters")
    entries = {
        "as it is": folder.entry("letters"),
        "shots": folder.entry("letters", num_fewshot=2),
        "filter": folder.entry("letters", metric="begins,whole"),
    }
    contents = {what: get_task(entry).content() for what, entry in entries.items()}
    assert str(folder.path) not in json.dumps(contents), "no paths"
    assert contents["as it is"]["lm_eval_task_version"] == 3

    def change(what: str, file: str, old: str, new: str) -> None:
        text = (folder.path / file).read_text()
        assert old in text
        (folder.path / file).write_text(text.replace(old, new, 1))
        contents[what] = content_of_a_new_process(entries["shots"])
        (folder.path / file).write_text(text)

    def content_of_a_new_process(entry):
        from jobs.tasks.lm_eval import _content

        fresh()
        _content.cache_clear()
        return get_task(entry).content()

    change("scorer", "scorer.py", "/ len(target)", "/ max(1, len(target))")
    change("prompt", "letters.yaml", "What is", "Say")
    change("document", "test.jsonl", "amber", "azure")
    change("example", "train.jsonl", "lamp1", "lamp7")
    assert len({json.dumps(content, sort_keys=True) for content in contents.values()}) == len(contents)
    assert content_of_a_new_process(entries["shots"]) == contents["shots"]


def test_a_document_that_has_changed_is_not_scored(folder):
    task = get_task(folder.entry(folder.add("lamps")))
    first, *_, last = samples(task)
    made = documents(6)
    made[0]["facts"] += " The code of lamp9 is red."
    folder.write_documents("test", made[:5])
    fresh()
    for sample in (first, last):
        with pytest.raises(ConfigError, match=r"must be the one that was asked about.*run the sweep again"):
            task.score("amber", sample.references, sample.meta)
    unchanged = samples(task)[1]
    assert task.score("jade", unchanged.references, unchanged.meta) == 0


def test_a_prompt_is_never_cut(folder):
    made = documents(6)
    made[2]["facts"] = "word " * 90
    made[4]["facts"] = "word " * 110
    folder.write_documents("test", made)
    task = get_task(folder.entry(folder.add("lamps")))
    lengths = [Words().count(sample.prompt) for sample in samples(task)]
    iterator = task.samples(Words(), length=80, count=6, seed=0)
    assert next(iterator).meta["document"] == 0
    with pytest.raises(ConfigError) as error:
        list(iterator)
    assert f"got 80 tokens for document 2 with {lengths[2]}; use at least {lengths[4]}" in str(error.value)
    assert len(samples(task, length=max(lengths))) == 6


def test_functions_that_draw_at_random_repeat_themselves(folder):
    (folder.path / "draw.py").write_text("import random\ndef text(doc): return f'{random.random()}'\n")
    from tests.jobs.lm_eval_folder import Function

    task = get_task(folder.entry(folder.add("drawn", doc_to_text=Function("draw.text"))))
    first = [sample.prompt for sample in samples(task)]
    assert first == [sample.prompt for sample in samples(task)]
    assert len(set(first)) == 6


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a kind": (
        {"output_type": "loglikelihood"},
        "task 't' must have output_type generate_until, got loglike",
    ),
    "sampling": ({"generation_kwargs": {"do_sample": True, "until": []}}, "greedy decoding.*do_sample: True"),
    "heat": ({"generation_kwargs": {"temperature": 0.7, "until": []}}, "greedy decoding.*temperature: 0.7"),
    "beams": ({"generation_kwargs": {"num_beams": 4, "until": []}}, "greedy decoding.*num_beams: 4"),
    "a penalty": (
        {"generation_kwargs": {"repetition_penalty": 2}},
        "repetition_penalty must be one of until",
    ),
    "no tokens": (
        {"generation_kwargs": {"max_gen_toks": 0}},
        "max_gen_toks must be an integer of at least 1",
    ),
    "an ending": ({"generation_kwargs": {"until": [1]}}, "until must be a string or a list of strings"),
    "code": ({"unsafe_code": True}, "must not run what a model wrote"),
    "images": ({"doc_to_image": ["picture"]}, "must be text alone"),
    "a key": ({"do_to_text": "x"}, "must have known keys, got .*do_to_text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tasks_that_no_sweep_can_run(folder, case):
    changes, message = REFUSED[case]
    folder.add("t", **changes)
    with pytest.raises(ConfigError, match=message):
        make_tasks(folder.entry("t"))


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no tasks": ({"name": "lm_eval"}, r"tasks.lm_eval.tasks must be given"),
    "one name": ({"name": "lm_eval", "tasks": "lamps"}, "must be a list of at least one name, got 'lamps'"),
    "no name": ({"name": "lm_eval", "tasks": []}, "must be a list of at least one name"),
    "a key": (
        {"name": "lm_eval", "tasks": ["lamps"], "shots": 1},
        r"tasks.lm_eval.shots must be a known key",
    ),
    "a folder": (
        {"name": "lm_eval", "tasks": ["x"], "include_path": "/no/such"},
        "include_path must be a folder",
    ),
    "shots": ({"name": "lm_eval", "tasks": ["x"], "num_fewshot": -1}, "num_fewshot must be an integer"),
    "a metric": ({"name": "lm_eval", "tasks": ["x"], "metric": 1}, "metric must be a string"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_that_say_nothing(case):
    entry, message = ENTRIES[case]
    with pytest.raises(ConfigError, match=message):
        make_tasks(entry)


def test_a_group_that_changes_its_tasks(folder):
    folder.add("lamps")
    for changes in ({"num_fewshot": 2}, {"task": [{"task": "lamps", "num_fewshot": 2}]}):
        group = {"group": "all", "task": ["lamps"], **changes}
        (folder.path / "all.yaml").write_text(json.dumps(group))
        fresh()
        with pytest.raises(ConfigError, match=r"got group 'all' with num_fewshot for .*; name the tasks"):
            make_tasks(folder.entry("all"))


def test_settings_that_lm_eval_would_ignore(folder):
    folder.add("zero", num_fewshot=0)
    with pytest.raises(ConfigError, match="num_fewshot must be left out for 'zero', whose own is 0, got 2"):
        make_tasks(folder.entry("zero", num_fewshot=2))


def test_a_data_set_without_documents(folder):
    folder.write_documents("test", [])
    with pytest.raises(ConfigError, match=r"'lamps' must .*, got .*[^ :]; check .* has documents"):
        get_task(folder.entry(folder.add("lamps"))).content()


@pytest.mark.parametrize("key", ["metric", "include_path"])
def test_empty_strings_are_refused(key):
    with pytest.raises(ConfigError, match=f"tasks.lm_eval.{key} must be a string that is not empty, got ''"):
        make_tasks({"name": "lm_eval", "tasks": ["gsm8k"], key: ""})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", "must be one that the task gives, got f1; choose among exact_match"),
        ("exact_match,strict", "must name a filter of the task, got strict; choose among word, whole"),
    ],
)
def test_metrics_that_are_not_there(folder, metric, message):
    with pytest.raises(ConfigError, match=message):
        get_task(folder.entry(folder.add("lamps"), metric=metric)).content()


def test_a_metric_that_is_no_number_per_answer(folder):
    chrf = {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}
    folder.add("translated", metric_list=[chrf])
    with pytest.raises(ConfigError, match="must be named where no mean is better when higher"):
        get_task(folder.entry("translated")).content()
    task = get_task(folder.entry("translated", metric="chrf"))
    with pytest.raises(ConfigError, match=r"must give a number from 0 to 1 per answer, got .* from chrf"):
        task.content()


def test_a_document_that_breaks_its_template(folder):
    from tests.jobs.lm_eval_folder import Function

    (folder.path / "broken.py").write_text(
        "def text(doc): return doc['answer'][:1 // (doc['answer'] != 'jade')]"
    )
    task = get_task(folder.entry(folder.add("broken", doc_to_text=Function("broken.text"))))
    bad = next(i for i, doc in enumerate(documents(6)) if doc["answer"] == "jade")
    with pytest.raises(
        ConfigError, match=f"document {bad} of lm_eval:broken must suit its task, got ZeroDiv"
    ):
        samples(task)


@pytest.mark.slow  # lm-eval reads its thousands of files once
def test_lm_evals_own_tasks_are_known_by_name():
    (gsm8k,) = make_tasks({"name": "lm_eval", "tasks": ["gsm8k"]})
    assert gsm8k.stop == ("Question:", "</s>", "<|im_end|>")
    assert gsm8k.max_new_tokens == 256
    bbh = make_tasks({"name": "lm_eval", "tasks": ["bbh_cot_fewshot"]})
    assert len(bbh) == 27
    assert bbh[0].spec["tasks"] == ["bbh_cot_fewshot_boolean_expressions"]
    for name, message in {
        "hellaswag": "must have output_type generate_until, got multiple_choice",
        "humaneval": "must not run what a model wrote",
        "squadv2": "must be configured in YAML, got one that is a Python class",
        "gsm8kk": "got 'gsm8kk'; did you mean gsm8k",
    }.items():
        with pytest.raises(ConfigError, match=message):
            make_tasks({"name": "lm_eval", "tasks": [name]})
