"""Prompts, keys and groups: the same samples for every method, the same keys in every process."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import jobs.sweeping.spec
from jobs.disk.record import read_plan
from jobs.sweeping import forecast
from jobs.sweeping.progress import clock_time
from jobs.sweeping.prompts import Prompts
from jobs.sweeping.spec import load_sweep
from jobs.sweeping.work import common_prefix
from jobs.tasks import Sample, get_task
from spts.cost import dense_flops, reused_flops
from spts.errors import ConfigError
from tests.jobs.swept import SweptEngine, made, run


@pytest.fixture
def prepared(config, write_config, tmp_path):
    """The work of the configuration with some keys changed."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def prepare_it(**change):
            return stack.enter_context(made(write_config({**config, **change}), tmp_path / "made"))

        yield prepare_it


def test_every_method_gets_the_same_prompts(prepared):
    one = prepared()
    assert len(one.work) == 3 * 2 * 2 * 2
    by_label: dict[str, set] = {}
    for work in one.work:
        by_label.setdefault(work.cell.record.label, set()).add((work.sample, one.token_ids(work)))
    assert by_label["dense"] == by_label["spts"] == by_label["random"]
    assert len(by_label["dense"]) == 8


def test_keys_are_unique_and_repeatable(prepared):
    keys = [work.key for work in prepared().work]
    assert len(set(keys)) == len(keys)
    assert keys == [work.key for work in prepared().work]


def test_more_samples_keep_the_ones_that_are_done(prepared):
    few = {work.key for work in prepared(samples=2).work}
    many = {work.key for work in prepared(samples=3).work}
    assert few < many


def test_samples_per_length(prepared):
    work = prepared(samples={340: 1, 420: 3}).work
    counts = {length: sum(one.cell.length == length for one in work) for length in (340, 420)}
    assert counts == {340: 3 * 2 * 1, 420: 3 * 2 * 3}


def test_prompts_fill_their_length_and_hold_what_is_asked(prepared, tmp_path):
    one = prepared()
    planned = {sample.key: sample for sample in read_plan(tmp_path / "made").samples}
    assert len(planned) == len(one.work)
    for work in one.work:
        assert 0.8 * work.cell.length < work.num_tokens <= work.cell.length
        sample = planned[work.key]
        assert sample == one.plan_file.sample(work.planned)
        assert sample.prompt_tokens == work.num_tokens
        text = one.prompts.answer(one.token_ids(work), ())
        assert text.endswith(sample.question)
        assert get_task(work.cell.record.task).score(text, sample.references, sample.meta) == 1.0
        assert "Question:" in sample.question
        assert 0 <= sample.meta["depth"] <= 1


def test_predicted_cost(prepared):
    one = prepared()
    for work in one.work:
        dense = dense_flops(one.plans[0].shape, work.num_tokens).total
        assert work.flops == dense if work.cell.record.label == "dense" else work.flops < 0.8 * dense


QUESTIONS = [
    {
        "needle": f"The code of {key} is walnut.",
        "question": f"What is the code of {key}?",
        "answers": ["walnut"],
    }
    for key in ("lantern", "harbor")
]


def test_what_questions_share_is_counted_once(prepared):
    one = prepared(tasks=[{"name": "grid", "depths": 2, "questions": QUESTIONS}], lengths=[420], samples=4)
    shape = one.plans[0].shape
    (ready,) = one.prepared
    for group in ready.groups:
        first, second = group.members
        whole = dense_flops(shape, second.num_tokens).total
        kept = dense_flops(shape, group.prefix_tokens).total
        assert group.prefix_tokens > 300
        if group.cell.record.label == "dense":  # all layers of the beginning are kept
            assert first.flops == dense_flops(shape, first.num_tokens).total
            # The cost of the prefix alone, less its last token's logits, which nobody computes.
            assert (
                whole - kept
                <= second.flops
                < 1.02 * (whole - kept) + 2 * shape.hidden_size * shape.vocab_size
            )
        assert second.flops < first.flops
    cost = ready.costs["dense", 420]
    groups = [group for group in ready.groups if group.cell.record.label == "dense"]
    assert cost.flops - cost.reused_flops == pytest.approx(sum(group.flops for group in groups))
    seconds = (sum(each.flops - each.reused_flops for each in ready.costs.values())) / 1e6
    assert forecast.total(one.prepared, flops_per_s=1e6).endswith(f", {clock_time(seconds)} of prefill")
    row = next(line for line in forecast.table(ready, flops_per_s=1e6) if line.startswith("dense"))
    assert row.split()[-1] == clock_time((cost.flops - cost.reused_flops) / 1e6)


def test_where_attention_is_sparse_whole_blocks_are_shared(prepared, config):
    sparse = {**config["methods"][1], "label": "sparse"}
    sparse["schedule"] = {**sparse["schedule"], "attention_density": 0.1}
    tasks = [{"name": "grid", "depths": 2, "questions": QUESTIONS}]
    one = prepared(tasks=tasks, lengths=[420], samples=4, methods=[*config["methods"], sparse])
    shape, (ready,) = one.plans[0].shape, one.prepared
    shared: dict[str, list[int]] = {}
    for group in ready.groups:
        shared.setdefault(group.cell.record.label, []).append(group.prefix_tokens)
    assert shared["sparse"] == [tokens - tokens % 128 for tokens in shared["spts"]]
    assert any(tokens % 128 for tokens in shared["spts"])
    schedule = next(cell for cell in one.plans[0].cells if cell.record.label == "sparse").method.schedule_for(
        6
    )
    saved = sum(
        reused_flops(shape, tokens, schedule.first_skip_layer, 0.1) for tokens in shared["sparse"]
    )  # two questions on each context
    assert ready.costs["sparse", 420].reused_flops == saved


@dataclass(frozen=True, kw_only=True)
class Quiz:
    """A task as other families make them: shared contexts, chat, stop strings, given answers."""

    entries: tuple[Sample, ...]
    stop: tuple[str, ...] = ()
    name: str = "quiz"
    version: int = 1
    max_new_tokens: int = 12

    @property
    def spec(self):
        return {"name": self.name}

    def content(self):
        return {}

    def samples(self, tokens, *, length, count, seed) -> Iterator[Sample]:
        yield from self.entries[:count]

    def score(self, text, references, meta):
        return float(text == references[0])


def sample(number: int, prompt: str, **more) -> Sample:
    return Sample(id=f"q{number}", prompt=prompt, references=("x",), **more)


@pytest.fixture
def quiz(prepared, monkeypatch):
    """The work of a made-up task."""

    def prepare_it(*entries: Sample, stop=(), samples=9, **change):
        task = Quiz(entries=entries, stop=stop)
        monkeypatch.setattr(jobs.sweeping.spec, "make_tasks", lambda entry: (task,))
        return prepared(tasks=["quiz"], lengths=[340], samples=samples, **change)

    return prepare_it


DENSE = [{"name": "dense"}]


def test_a_context_and_its_questions_are_one_group_per_method(quiz):
    text = "the quick brown fox jumps over the lazy dog " * 8
    one = quiz(
        sample(0, text + "Who jumps?", context="fox"),
        sample(1, "alone"),
        sample(2, text + "Who is lazy?", context="fox"),
        sample(3, text + "Why?", context="fox"),
        sample(4, "alone as well"),
    )
    for label in ("dense", "spts", "random"):
        groups = [g for g in one.groups if g.cell.record.label == label]
        assert [[w.sample for w in g.members] for g in groups] == [["q0", "q2", "q3"], ["q4"], ["q1"]]
        assert [g.cell.record.label for g in one.groups[:3]] == ["dense", "spts", "random"]
        shared, *others = groups
        prompts = [one.token_ids(work) for work in shared.members]
        assert len({tuple(p[: shared.prefix_tokens]) for p in prompts}) == 1
        assert len({tuple(p[: shared.prefix_tokens + 1]) for p in prompts}) > 1
        assert one.prompts.answer(prompts[0][: shared.prefix_tokens], ()).startswith(text)
        assert [g.prefix_tokens for g in others] == [0, 0]


def test_engines_have_room_for_a_prefix_of_every_lane(quiz, config, write_config):
    text = "the quick brown fox jumps over the lazy dog " * 8
    one = quiz(sample(0, text + "Who?", context="fox"), sample(1, text + "Why?", context="fox"))
    (prepared,) = one.prepared
    dense = next(g for g in prepared.groups if g.cell.record.label == "dense")
    # Keys and values of 2 heads of 16, float32, in 6 layers.
    assert prepared.prefix_bytes == dense.prefix_tokens * 6 * 2 * 2 * 16 * 4
    sweep = load_sweep(write_config({**config, "tasks": ["quiz"], "engine": {"in_flight": 3}}))
    plan = prepared.plan
    assert plan.engine_config(sweep, prefix_bytes=2**30).prefix_cache_bytes == 3 * 2**30
    assert plan.engine_config(sweep, prefix_bytes=10).prefix_cache_bytes == 2**31


def test_a_prefix_leaves_every_prompt_a_token(quiz):
    (group,) = quiz(
        sample(0, "the fox jumps", context="a"), sample(1, "the fox jumps over", context="a"), methods=DENSE
    ).groups
    assert group.prefix_tokens == group.members[0].num_tokens - 1 > 0
    (group,) = quiz(sample(0, "the fox", context="a"), sample(1, "a hen", context="a"), methods=DENSE).groups
    assert group.prefix_tokens == 0


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_common_prefix(first, second):
    expected = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        expected += 1
    assert common_prefix(array("i", first), array("i", second)) == expected


def test_a_chat_goes_through_the_models_template(quiz, tiny_model):
    one = quiz(sample(0, "Who jumps?", chat=True), sample(1, "Who jumps?"), methods=DENSE)
    by_id = {work.sample: one.token_ids(work) for work in one.work}
    reference = AutoTokenizer.from_pretrained(tiny_model)
    chat = [{"role": "user", "content": "Who jumps?"}]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert by_id["q0"] == tuple(reference(expected, add_special_tokens=False)["input_ids"])
    assert by_id["q1"] == tuple(reference("Who jumps?")["input_ids"])


def test_without_a_template_a_chat_is_plain(tiny_model, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    prompts = Prompts(tmp_path)
    assert prompts.encode(sample(0, "Who?", chat=True)) == prompts.encode(sample(0, "Who?"))


def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(tiny_model, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    prompts = Prompts(tmp_path)
    token_ids = prompts.encode(sample(0, "Who?", chat=True))
    assert prompts.answer(token_ids, ()) == "26 Jul 2024: Who?"


def test_an_answer_that_is_given_is_followed(quiz, tmp_path):
    one = quiz(sample(0, "the fox", follow=(5, 6, 7)), sample(1, "the fox", follow=(5, 6)), methods=DENSE)
    engine = SweptEngine()
    run(tmp_path / "out", one, [engine])
    asked = {request.follow: request for request in engine.requests}
    assert {follow: r.max_new_tokens for follow, r in asked.items()} == {(5, 6, 7): 3, (5, 6): 2}
    assert len({request.token_ids for request in engine.requests}) == 1
    planned = [one.plan_file.sample(work.planned) for work in one.work]
    assert planned[0].prompt_sha256 != planned[1].prompt_sha256


def test_an_answer_ends_before_its_stop_string(quiz, tmp_path):
    """The fake engine answers with the prompt, so the prompt says what the answer is."""
    prompt = "the fox jumps over the lazy dog and the hen"
    plain = quiz(sample(0, prompt), methods=DENSE)
    whole = run_one(plain, tmp_path / "whole")
    stopped = quiz(sample(0, prompt), methods=DENSE, stop=("laz", "ver t", "dog"))
    row = run_one(stopped, tmp_path / "cut")
    assert row.text == whole.text.partition("ver t")[0] == "the fox jumps o"
    assert row.finish_reason == "stop"
    assert row.token_ids == whole.token_ids[: len(row.token_ids)]
    assert len(row.token_ids) < len(whole.token_ids)
    needed = [plain.prompts.answer(whole.token_ids[:n], ()) for n in range(len(whole.token_ids))]
    assert len(row.token_ids) == next(n for n, text in enumerate(needed) if "ver t" in text)
    assert row.total_s == pytest.approx(row.ttft_s + row.decode_s)
    assert stopped.work[0].cell.record.id != plain.work[0].cell.record.id


def run_one(one, folder):
    from jobs.disk.record import read_rows

    run(folder, one, [SweptEngine(step_s=0.002)])
    (row,) = read_rows(folder).values()
    return row


def test_a_task_with_fewer_samples_and_one_with_none(quiz, prepared):
    entries = [sample(i, f"the fox {i}") for i in range(3)]
    assert len(quiz(*entries, samples=2, methods=DENSE).work) == 2
    assert len(quiz(*entries, samples=9, methods=DENSE).work) == 3
    with pytest.raises(ConfigError, match="tasks must have samples, got none of 'quiz' at 340 tokens"):
        quiz(samples=9)


def test_the_same_sample_twice_is_refused(quiz):
    one = sample(0, "the fox")
    with pytest.raises(ConfigError, match="samples of a task must differ, got 'q0' of 'quiz' twice"):
        quiz(one, replace(one), methods=DENSE)


def test_seeds_that_give_the_same_prompts_are_refused(quiz):
    entries = [sample(i, f"the fox {i}") for i in range(3)]
    with pytest.raises(ConfigError, match="seeds must give samples of their own, got a prompt of 'quiz'"):
        quiz(*entries, methods=DENSE, seeds=[0, 1])


def test_a_prompt_that_is_longer_than_its_length_says(quiz):
    long = sample(0, "the fox " * 400)
    with pytest.raises(ConfigError, match=r"context of 512 tokens, got \d+ \+ 12 in sample 'q0'"):
        quiz(long, methods=DENSE)
