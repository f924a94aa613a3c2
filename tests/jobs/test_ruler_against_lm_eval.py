"""RULER's tasks beside lm-eval's generators: the same prompts but for names, numbers and their order.

The generators run as they are installed. What they import and a test must not use (word lists and data from
the network, NLTK's models) stands in for itself.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.tasks import get_task
from jobs.tasks.ruler import KINDS, RulerTask
from jobs.tasks.ruler_kind import Draft
from jobs.tasks.ruler_niah import Niah
from jobs.tasks.ruler_passages import hotpotqa_like, squad_like
from tests.jobs.ruler_stand_ins import Words

FOLDER = "tasks/ruler"
NO_PARAMS: Mapping[str, str] = {}
HAYSTACK = {"noise": "repeat", "essay": "essay", "needle": "needle"}
SENTENCES = [f"Here is sentence {i}." for i in range(120)]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    """Each generator by the name of its file."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("lm-eval is not installed")
    folder = Path(spec.submodule_search_locations[0]) / FOLDER
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(26 * 26)]
    lists = {
        "noun": words,
        "adjective": words,
        "verb": words,
        "nouns": words,
        "adjectives": words,
        "verbs": words,
    }

    def module(name: str, **values: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(values)
        return made

    stand_ins = {
        "transformers": module("transformers", AutoTokenizer=None),
        "datasets": module("datasets", Dataset=None),
        "wonderwords": module("wonderwords", RandomWord=lambda: SimpleNamespace(_categories=lists)),
        "nltk": module(
            "nltk", data=SimpleNamespace(find=lambda name: name), sent_tokenize=sentences, download=None
        ),
        **{name: module(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ruler")},
    }
    loaded = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        for name, made in stand_ins.items():
            patch.setitem(sys.modules, name, made)
        for name in (
            "common_utils",
            "prepare_niah",
            "niah_utils",
            "vt_utils",
            "cwe_utils",
            "fwe_utils",
            "qa_utils",
        ):
            full = f"lm_eval.tasks.ruler.{name}"
            file_spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
            assert file_spec is not None and file_spec.loader is not None
            made = importlib.util.module_from_spec(file_spec)
            patch.setitem(sys.modules, full, made)
            file_spec.loader.exec_module(made)
            setattr(loaded, name, made)
    loaded.niah_utils.get_tokenizer = lambda name: tokenizer
    return loaded


def tokenizer(text: str) -> SimpleNamespace:
    return SimpleNamespace(input_ids=text.split())


def ours(
    name: str, units: int, params: Mapping[str, str] = NO_PARAMS, *, index: int = 0, length: int = 8192
) -> Draft:
    task = RulerTask(name=name, **params)
    return task.kind.draw(random.Random(1), task._sources(), Words(), index=index, units=units, length=length)


def nameless(text: str) -> str:
    """The text with its keys and values struck out, one space between words."""
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b[a-z]+-[a-z]+\b|\b\d{7}\b", "#", text)
    return " ".join(text.split())


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("niah")])
def test_needles(name, lm_eval, tmp_path):
    kind, generator = KINDS[name], lm_eval.prepare_niah
    assert isinstance(kind, Niah)
    params: dict[str, str] = {}
    haystack = generator.get_haystack(type_haystack="repeat" if kind.haystack == "noise" else "needle")
    if kind.haystack == "essay":
        (tmp_path / "text.txt").write_text(" ".join(SENTENCES), encoding="utf-8")
        params, haystack = {"haystack": str(tmp_path)}, " ".join(SENTENCES).split()
    units = 120
    # lm-eval's function of that name, less its download: with its own settings.
    utils, settings = lm_eval.niah_utils, {}
    utils.get_haystack = lambda type_haystack: haystack
    utils.generate_samples = lambda text, **given: settings.update(given) or iter(())
    utils.download_dataset = list
    getattr(utils, name)(tokenizer="any")
    random.seed(0)
    (theirs,) = generator.generate_samples(haystack, **{**settings, "num_samples": 1})
    assert settings["type_haystack"] == HAYSTACK[kind.haystack]
    if kind.haystack != "essay":
        needles = kind.num_keys * kind.num_values
        units = theirs["input"].count("\n") - 1 - needles
    draft = ours(name, units, params)
    assert len(draft.references) == len(theirs["outputs"])
    prompt = f"{theirs['input']} {theirs['gen_prefix']}"

    def pieces(text: str) -> Counter[str]:
        return Counter(piece for line in text.split("\n") for piece in sentences(nameless(line)))

    assert pieces(draft.prompt) == pieces(prompt)
    first, last = draft.prompt.split("\n")[0], draft.prompt.split("\n")[-1]
    assert nameless(first) == nameless(prompt.split("\n")[0])
    assert nameless(last) == nameless(prompt.split("\n")[-1])
    task = get_task(name)
    assert task.max_new_tokens == 128


def test_variables(lm_eval):
    utils = lm_eval.vt_utils
    random.seed(0)
    example = utils.sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[
        0
    ]
    (theirs,) = utils.sys_vartrack_w_noise_random(
        tokenizer, num_samples=1, max_seq_length=4096, icl_example=example
    )
    prompt = f"{theirs['input']} {theirs['gen_prefix']}"
    draft = ours("vt", 60)
    noise = RulerTask(name="vt")._sources().texts["noise"]

    def frame(text: str) -> str:
        text = text.replace(noise, " ")
        text = re.sub(r"VAR [A-Z]+ = (VAR [A-Z]+|\d{5})", " ", text)
        return " ".join(re.sub(r"\b[A-Z]{3}\b|\b\d{5}\b", "#", text).split())

    assert frame(draft.prompt) == frame(prompt)
    assignments = r"VAR [A-Z]{3} =", r"VAR [A-Z]{5} =", r"= VAR [A-Z]{3}\b", r"= VAR [A-Z]{5}\b", r"= \d{5}\b"
    for pattern in assignments:
        assert len(re.findall(pattern, draft.prompt)) == len(re.findall(pattern, prompt)), pattern
    example_noises = example["input"].count(noise)
    assert draft.prompt.count(noise) == 60 + example_noises
    assert len(draft.references) == len(theirs["outputs"]) == 5


@pytest.mark.parametrize("length", [2048, 8192])
def test_common_words(length, lm_eval):
    random.seed(0)
    example, asked, answer = lm_eval.cwe_utils.generate_input_output(70, length)
    draft = ours("cwe", 70, length=length)
    prompt = f"{example}\n{asked}"

    def frame(text: str) -> str:
        return " ".join(re.sub(r"\d+\. [a-z]+", " ", text).split())

    def counts(text: str) -> list[int]:
        return sorted(Counter(re.findall(r"\d+\. ([a-z]+)", text)).values())

    assert frame(draft.prompt) == frame(prompt)
    shown = draft.prompt[: draft.prompt.rindex("\n1. ")]
    assert counts(draft.prompt[len(shown) :]) == counts(asked)
    assert counts(shown) == counts(example)
    assert len(draft.references) == len(answer) == 10


@pytest.mark.parametrize("units", [74, 500, 5000])
def test_frequent_words(units, lm_eval):
    length = 8192
    random.seed(0)
    text, answer, _ = lm_eval.fwe_utils.generate_input_output(
        10**6, tokenizer, num_words=units, vocab_size=length // 50
    )
    draft = ours("fwe", units, length=length)

    words = Counter(re.findall(r"\S+", draft.prompt))
    assert all(words[reference] > 1 for reference in draft.references)
    coded = re.compile(r"(?:(?:[a-z]{6}|\.\.\.)(?: |(?=\n))){30,}")
    for prompt in (text, draft.prompt):
        assert len(coded.findall(prompt)) == 1
    assert coded.sub("#", draft.prompt) == coded.sub("#", text)
    profiles = [sorted(Counter(coded.findall(p)[0].split()).values()) for p in (draft.prompt, text)]
    assert profiles[0] == profiles[1]
    top = [word for word, _ in Counter(coded.findall(draft.prompt)[0].split()).most_common(4)]
    assert set(top[1:]) == set(draft.references)
    assert len(answer) == 3


@pytest.mark.parametrize(("name", "form"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_questions(name, form, lm_eval, tmp_path):
    data: Any = squad_like() if form == "squad" else hotpotqa_like()
    if form == "squad":  # what the real file has: several answers, and questions without any
        first = data["data"][0]["paragraphs"][0]["qas"]
        first[0]["answers"].append({"text": "another"})
        first.insert(0, {"question": "Unknown?", "answers": [], "is_impossible": True})
    utils = lm_eval.qa_utils
    utils.download_json = lambda url: data
    qas, docs = utils.read_squad("here") if form == "squad" else utils.read_hotpotqa("here")
    file = tmp_path / "set.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    questions = RulerTask(name=name, **{form: str(file)})._sources().questions
    assert questions is not None
    assert list(questions.documents) == docs
    assert [(q.text, list(q.answers), list(q.documents), list(q.close)) for q in questions.questions] == [
        (q["query"], q["outputs"], q["context"], q.get("more_context", [])) for q in qas
    ]
    random.seed(0)
    for index, units in ((0, 10), (3, 30), (5, len(docs) - 1)):
        text, answers = utils.generate_input_output(index, units, qas, docs)
        prefix = utils.CONFIG["answer_prefix"]
        draft = ours(name, units, {form: str(file)}, index=index)
        assert list(draft.references) == answers
        documents = re.compile(r"Document (\d+):\n(.*?)\n\n(?=Document |Answer )", re.DOTALL)
        found = [documents.findall(each) for each in (draft.prompt, f"{text} {prefix}")]
        assert [i for i, _ in found[0]] == [i for i, _ in found[1]] == [str(i + 1) for i in range(units)]
        assert documents.sub("", draft.prompt) == documents.sub("", f"{text} {prefix}")
        own = {docs[i] for i in [*qas[index]["context"], *qas[index].get("more_context", [])][:units]}
        for shown in ({text for _, text in each} for each in found):
            assert len(shown) == units
            if units >= 12 or form == "hotpotqa":
                assert own <= shown
            assert {docs[i] for i in qas[index]["context"]} <= shown


ANSWERS = st.text(st.sampled_from("aAbB \n\t\x00\x1f\x20ßé."), max_size=12)


@given(ANSWERS, st.lists(ANSWERS.filter(bool), min_size=1, max_size=4))
def test_scores(lm_eval, text, references):
    utils = lm_eval.common_utils
    answer = utils.postprocess_pred([text])
    every = utils.string_match_all(answer, [references])
    best = max(utils.string_match_all(answer, [[reference]]) for reference in references)
    assert get_task("cwe").score(text, tuple(references), {}) == every
    assert get_task("qa_1").score(text, tuple(references), {}) == best
