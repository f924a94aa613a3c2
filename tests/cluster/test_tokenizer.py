"""Text out of tokens: whole characters only, and stop strings wherever they fall."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.tokenizer import TextStream, TextTokenizer
from spts.errors import ModelError, RequestError
from tests.cluster.tiny import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer(folder)


def streamed(tokenizer, ids, stop=()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.finish()], stream.stopped


TEXTS = ["the quick brown fox", "héllo wörld", "😀 and 中文 and ẞ", "a\n\n b", " leading", "👩‍👩‍👧"]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text_and_never_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(text=st.text(max_size=40))
def test_any_text_survives_the_round_trip(tokenizer, text):
    whole = tokenizer.tokenizer.decode(list(tokenizer.encode(text)), skip_special_tokens=True)
    assert "".join(streamed(tokenizer, tokenizer.encode(text))[0]) == whole


def test_bytes_that_never_become_a_character_end_as_the_replacement_character(tokenizer):
    ids = tokenizer.encode("a😀")[:-1]
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == "a\ufffd"
    assert "\ufffd" not in "".join(pieces[:-1])


@given(
    text=st.text(alphabet="abAB é", max_size=30),
    stops=st.lists(st.text(alphabet="abAB é", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_cuts_where_str_find_says(tokenizer, text, stops):
    pieces, stopped = streamed(tokenizer, tokenizer.encode(text), stops)
    # The earliest character at which some stop string is complete decides, as a reader of the stream would
    # see it.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert ("".join(pieces), stopped) == (text, False)
        return
    assert stopped
    assert any("".join(pieces) == text[: text.find(stop)] for stop in stops if stop in text)
    assert not any(stop in "".join(pieces) for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_until_it_is_certain(tokenizer):
    letters = {letter: tokenizer.encode(letter)[0] for letter in "aENDX"}
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(letters[letter]) for letter in "aEX"] == ["a", "", "EX"]
    assert [stream.push(letters[letter]) for letter in "EN"] == ["", ""]
    assert (stream.push(letters["D"]), stream.stopped, stream.push(letters["a"])) == ("", True, "")


def test_special_tokens_have_no_text(tokenizer):
    end = tokenizer.tokenizer.token_to_id("<|end|>")
    ids = [*tokenizer.encode("fox"), end, *tokenizer.encode("hen")]
    assert "".join(streamed(tokenizer, ids)[0]) == "foxhen"
    assert tokenizer.special_ids(["fox", "<|end|>", "<|no"]) == (end,)


@pytest.mark.slow
def test_prompts_and_chats_have_the_tokens_that_transformers_gives_them(folder, tokenizer):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo 😀"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(tokenizer.encode_chat(messages)) == list(expected)
    for text in TEXTS:
        assert list(tokenizer.encode(text)) == reference(text)["input_ids"]


def test_a_chat_template_may_refuse_and_may_be_missing(tmp_path, folder):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    message = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match="a model without one; use /v1/completions"):
        TextTokenizer(tmp_path).encode_chat(message)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="got roles must alternate"):
        TextTokenizer(tmp_path).encode_chat(message)


def test_a_chat_template_cannot_reach_the_machine(tmp_path, folder):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": escape}))
    with pytest.raises(RequestError, match="unsafe"):
        TextTokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model must have a tokenizer.json to be served, got none in"):
        TextTokenizer(tmp_path)


def test_the_router_process_needs_no_torch(folder):
    code = (
        "import sys; from cluster import app, router; from cluster.config import AppConfig;"
        f"config = AppConfig.model_validate({{'engines': {{'default': {{'model': {str(folder)!r}}}}},"
        "'pools': [{'method': {'name': 'dense'}}]});"
        "router.Router(config, {}).app();"
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_long_text_keeps_no_other_request_waiting(tokenizer):
    encoding = asyncio.create_task(asyncio.to_thread(tokenizer.encode, "the quick brown fox " * 50_000))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert len(await encoding) > 50_000
    assert turns > 5
