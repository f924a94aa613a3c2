"""Text to tokens and back, without torch: `tokenizers` for the vocabulary, jinja2 for the chat template.

Text comes back incrementally: a character whose bytes span tokens, or the beginning of what may become a stop
string, is held until it is certain.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from spts.errors import ModelError, RequestError


class TextTokenizer:
    """The tokenizer of a model folder: `tokenizer.json`, and its chat template.

    now: the date that a chat template may print. Raises ModelError when the folder has no `tokenizer.json`.
    """

    def __init__(self, folder: str | Path, *, now: Callable[[], datetime] = datetime.now) -> None:
        path = Path(folder)
        if not (path / "tokenizer.json").is_file():
            raise ModelError(
                f"model must have a tokenizer.json to be served, got none in {path}; save its tokenizer "
                "there",
                field="model",
            )
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._special = {
            name: value["content"] if isinstance(value, Mapping) else value
            for name, value in _config(path).items()
            if name.endswith("_token") and value is not None and not isinstance(value, bool)
        }
        source = chat_template(path)
        self._template = None if source is None else _compiled(source, now)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be used."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt, with whatever the tokenizer adds to one unless told otherwise."""
        # A batch of one: unlike `encode` it lets go of the GIL, so a long text keeps no other thread waiting.
        return tuple(self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of a conversation through the chat template. Raises RequestError, see `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation through the chat template, up to where the assistant begins to speak. It has all of
        its special tokens: `encode` would add some again.

        Raises RequestError, code "invalid_chat", when the model has no template or the template refuses.
        """
        if self._template is None:
            raise RequestError(
                "messages must go through a chat template, got a model without one; use /v1/completions",
                code="invalid_chat",
                field="messages",
            )
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special
            )
            return str(text)
        except TemplateError as error:
            raise RequestError(
                f"messages must suit the model's chat template, got {error}; change roles or order",
                code="invalid_chat",
                field="messages",
            ) from None

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def special_ids(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Token ids of those texts that are special tokens, such as "<|im_end|>"."""
        special = self.tokenizer.get_added_tokens_decoder() if texts else {}
        return tuple(
            token_id for token_id, token in special.items() if token.special and token.content in texts
        )

    def token_text(self, token_id: int) -> str:
        """One token on its own; U+FFFD stands for bytes that are only part of a character."""
        return self.text([token_id])


class TextStream:
    """The text of one answer, as far as it is certain. `push` tokens, `finish` at the end; `stopped` at a
    stop string."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = ""
        self._stop = tuple(stop)
        self._sent = 0
        self.stopped = False

    @property
    def position(self) -> int:
        """Where in the answer's text the next token's begins, in characters."""
        return len(self._decoded)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; it may be none, or reach back over several tokens.

        With stop string "END": tokens "a", "E", "X" give "a", "", "EX"; tokens "a", "E", "ND!" give "a", "",
        "" and then `stopped` is true.
        """
        if self.stopped:
            return ""
        self._ids.append(token_id)
        return self._advance(self._decode.step(self._tokenizer, token_id) or "", held=True)

    def finish(self) -> str:
        """What was held back, bytes that never became a character included (as U+FFFD)."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        return self._advance(rest, held=False)

    def _advance(self, new: str, *, held: bool) -> str:
        searched = len(self._decoded)
        self._decoded += new
        # A stop string may have begun in what came before, by one character less than its own length.
        hits = [self._decoded.find(stop, max(self._sent, searched - len(stop) + 1)) for stop in self._stop]
        found = [hit for hit in hits if hit >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._decoded) - (self._possible_stop() if held else 0)
        text, self._sent = self._decoded[self._sent : end], end
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self._decoded) - self._sent), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stop):
                return length
        return 0


def chat_template(folder: Path) -> str | None:
    """Source of a model folder's chat template: `chat_template.jinja`, else `tokenizer_config.json`'s own."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _config(folder).get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return source


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config


def _compiled(source: str, now: Callable[[], datetime]) -> Any:
    """The compiled chat template. It is the model's code, so it runs in a sandbox."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return environment.from_string(source)
