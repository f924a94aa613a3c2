"""What the demo model is trained on: text that is not held out, questions whose answers are in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from jobs.demo.batches import IGNORED
from jobs.demo.phases import PHASES
from jobs.demo.tokenizer import END, END_ID
from jobs.tasks.haystack import haystack
from jobs.tasks.needle import ask
from tests.jobs.short_training import SHORT, batches, bundled_tokenizer
from tests.jobs.test_needle import FACT, LINK


def answers_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each question of a sequence's text and the answers that its needles give, sorted."""
    facts, links = FACT.findall(text), dict(LINK.findall(text))
    for question in re.findall(r"^Question: (.*)$", text, re.MULTILINE):
        key = question.removesuffix("?").rsplit(" ", 1)[1]
        key = links[key] if "twin" in question else key
        yield ask(question), sorted(value for other, value in facts if other == key)


@pytest.mark.parametrize("phase", [PHASES[0], SHORT, PHASES[1]], ids=lambda phase: phase.name)
def test_targets_are_the_answers_and_nothing_else(phase):
    for tokens, targets in batches(phase=phase, tokens_per_batch=8192):
        length = targets.shape[1]
        assert length in phase.lengths
        assert tokens.shape == (8192 // length, length + 1)
        assert (tokens.dtype, targets.dtype) == (torch.int64, torch.int64)
        for row, wanted in zip(tokens[:16], targets[:16], strict=True):
            supervised = wanted != IGNORED
            assert torch.equal(wanted[supervised], row[1:][supervised])
            text = bundled_tokenizer().decode(row)
            expected = list(answers_of(text.replace(END, "\n")))
            said = bundled_tokenizer().decode(wanted[supervised]).split(END)
            assert said.pop() == ""
            assert [sorted(answer.strip().split(", ")) for answer in said] == [each for _, each in expected]
            for (question, _), answer in zip(expected, said, strict=True):
                assert question + answer + END in text


def test_sequences_are_training_text():
    known = "\n".join(haystack("train"))
    for tokens, _ in batches(phase=PHASES[1], tokens_per_batch=8192, count=2):
        for row in tokens:
            document = bundled_tokenizer().decode(row, skip_special_tokens=True).split("\n\nQuestion:")[0]
            lines = [line for line in document.split("\n") if not (FACT.match(line) or LINK.match(line))]
            assert len(lines) > 10
            assert "\n".join(lines) in known  # as it stands there, without the needles


def test_padding_is_shorter_than_a_line():
    for tokens, _ in batches():
        for row in tokens:
            assert int((row != END_ID).nonzero()[0]) < 160


def test_a_seed_and_a_phase_are_a_stream():
    def stream(**changes):
        return [tokens.tolist() for tokens, _ in batches(**changes)]

    assert stream() == stream()
    assert stream() != stream(seed=1)
    assert stream() != stream(phase=replace(SHORT, name="other"))
