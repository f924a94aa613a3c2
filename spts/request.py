"""What a prompt must satisfy before anything is computed; standard library only, so any process can ask."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from spts.errors import RequestError


def check_tokens(token_ids: Sequence[int], *, max_new_tokens: int, vocab_size: int, max_context: int) -> None:
    """Raises RequestError unless the prompt is made of this vocabulary's ids and fits into the context.

    The codes are empty_prompt, token_out_of_vocabulary, context_length_exceeded and, for `max_new_tokens`
    below 0, invalid_sampling. The first bad token is named by index and value.
    """
    if len(token_ids) == 0:
        raise RequestError(
            "token_ids must hold at least one token, got 0; send a prompt",
            code="empty_prompt",
            field="token_ids",
        )
    check_vocabulary("token_ids", token_ids, vocab_size)
    if max_new_tokens < 0:
        raise RequestError(
            f"max_new_tokens must be at least 0, got {max_new_tokens}; ask for a number of tokens",
            code="invalid_sampling",
            field="max_new_tokens",
        )
    if len(token_ids) + max_new_tokens > max_context:
        raise RequestError(
            f"prompt + max_new_tokens must be at most the context of {max_context} tokens, "
            f"got {len(token_ids)} + {max_new_tokens}; shorten the prompt or ask for fewer tokens",
            code="context_length_exceeded",
            field="max_new_tokens",
        )


def check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError, code token_out_of_vocabulary, at the first that is no id of the vocabulary."""
    if {*map(type, token_ids)} == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return  # half the time of the loop, which a long prompt's first token waits for
    for index, token_id in enumerate(token_ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{field} must be integers in 0..{vocab_size - 1}, got {token_id!r} at index {index}; "
                "use this model's own tokenizer, and plain integers (.tolist())",
                code="token_out_of_vocabulary",
                field=field,
            )


def check_prefix_tokens(prefix_tokens: int, token_ids: Sequence[int], block_tokens: int = 1) -> None:
    """Raises RequestError, code invalid_prefix, unless the prompt goes on after so many tokens, a multiple of
    `block_tokens`."""
    if not 0 <= prefix_tokens < len(token_ids):
        raise RequestError(
            f"prefix_tokens must be at least 0 and below the prompt's {len(token_ids)} tokens, "
            f"got {prefix_tokens}; leave at least the last token to the request",
            code="invalid_prefix",
            field="prefix_tokens",
        )
    if prefix_tokens % block_tokens:
        raise RequestError(
            f"prefix_tokens must be a multiple of {block_tokens} where attention is sparse, "
            f"got {prefix_tokens}; leave the rest to the request",
            code="invalid_prefix",
            field="prefix_tokens",
        )


def digest(token_ids: Sequence[int]) -> str:
    """sha256 of token ids, in hexadecimal: a short name for a long text."""
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()
