"""/tokenize and /detokenize, with the fields of vLLM's: what a client may send, and what it gets."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from cluster.api import Body, Listed, Message, turns
from cluster.errors import ApiError
from cluster.tokenizer import TextTokenizer


class TokenizeBody(Body):
    """POST /tokenize: a prompt or messages.

    add_special_tokens: what the tokenizer puts around a text; by default around a prompt, not messages,
    whose template says it all. add_generation_prompt: up to where the assistant begins to speak; of messages
    only. return_token_strs: each token's own text too.
    """

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "mm_processor_kwargs": ({},),
        "tools": ([],),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Listed[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        """See `Body`."""
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise ApiError(
                "invalid_request",
                f"prompt or messages must be given, got {given}; send one of them",
                "prompt",
            )
        if self.add_generation_prompt is not None and self.messages is None:
            raise ApiError(
                "invalid_request",
                "add_generation_prompt must only be given with messages, got a prompt; remove it",
                "add_generation_prompt",
            )

    @property
    def num_characters(self) -> int:
        """Length of all texts."""
        return len(self.prompt or "") + sum(len(message.text) for message in self.messages or ())

    def tokens(self, tokenizer: TextTokenizer) -> tuple[tuple[int, ...], list[str] | None]:
        """The token ids, and their own texts if asked for. Raises RequestError for messages that the chat
        template does not take."""
        if self.messages is None:
            assert self.prompt is not None
            ids = tokenizer.encode(self.prompt, add_special_tokens=self.add_special_tokens is not False)
        else:
            ids = tokenizer.encode_chat(
                turns(self.messages),
                add_generation_prompt=self.add_generation_prompt is not False,
                add_special_tokens=self.add_special_tokens is True,
            )
        return ids, [*map(tokenizer.token_text, ids)] if self.return_token_strs else None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Listed[Annotated[int, Field(ge=0, lt=2**32)]]

    def prompt(self, tokenizer: TextTokenizer) -> str:
        """The text of the tokens, special ones included. Raises ApiError for an id outside the vocabulary."""
        for token_id in self.tokens:
            if tokenizer.tokenizer.id_to_token(token_id) is None:
                raise ApiError(
                    "invalid_request",
                    f"tokens must be ids of the vocabulary, got {token_id}; remove it",
                    "tokens",
                )
        return tokenizer.text(self.tokens)
