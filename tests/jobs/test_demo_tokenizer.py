"""The demo model's tokenizer, the bundled one and one trained on less text."""

from __future__ import annotations

import pytest

from jobs.demo.tokenizer import END, END_ID, train_tokenizer
from jobs.tasks.haystack import haystack
from jobs.tasks.needle import words
from tests.jobs.short_training import bundled_tokenizer


@pytest.fixture(scope="module", params=["bundled", "new"])
def tokenizer(request):
    if request.param == "bundled":
        yield bundled_tokenizer()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.demo.tokenizer.haystack", lambda part: haystack(part)[:20_000])
        yield train_tokenizer()


def test_nouns_are_one_token(tokenizer):
    for word in words():
        assert len(tokenizer.encode(f" {word}")) == 1
        assert len(tokenizer.encode(f"of {word} is")) == 3


def test_lines_never_share_a_token(tokenizer):
    lines = haystack("held_out")[:2000]
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    one_by_one = [token for line in lines for token in tokenizer.encode(line) + newline]
    assert tokenizer.encode("\n".join([*lines, ""])) == one_by_one
    assert tokenizer.encode("\n\n\n") == newline * 3
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n    b\n \nc")
    assert {piece for piece, _ in pieces if "Ċ" in piece} == {"Ċ"}  # the byte of a line end


def test_text_comes_back(tokenizer):
    text = "\n".join(haystack("held_out")[:500]) + "\tnaïve ☃\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_a_tokenizer_says_about_itself(tokenizer):
    assert tokenizer.encode(END) == [END_ID] == [tokenizer.eos_token_id]
    assert (tokenizer.vocab_size, tokenizer.model_max_length) == (6144, 8448)
    messages = [{"role": "user", "content": "some text\n\nQuestion: what?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "some text\n\nQuestion: what?\nAnswer:"
