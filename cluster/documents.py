"""Which beginnings of prompts the ranks keep, what a new prompt can reuse of them, and which go first.

A beginning is good for prompts that run the same first layers in the same way: `layers` says how many these
are, and the density of their attention (`spts.schedule.Schedule`). Where it is below 1, whole blocks of
tokens are kept and reused.

A tree: a kept prompt that began like another goes on from it, and its own part holds only the tokens that are
new. So a document is there once, with the questions about it as branches. What is found is the longest
common beginning, token by token: the tokens themselves are compared, so a match is exact. Ranks hold the
tensors and do as they are told (`cluster.protocol.Step`); here are only token ids and bytes.

Pure Python: no torch, no ray.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

# Shorter beginnings, such as a chat template's first words, are not worth the copying.
LEAST_TOKENS = 64


Layers = tuple[int, float]
"""Layers that a beginning has run, and the density of their attention."""


@dataclass(kw_only=True, eq=False)
class Document:
    """A kept beginning: the first `begins` tokens of `before`, then `token_ids`.

    name: what ranks call it. num_bytes: of its own part, on one rank. users: prefills that read it or what
    goes on from it, so that it must stay.
    """

    name: int
    layers: Layers
    before: Document | None
    begins: int
    token_ids: tuple[int, ...]
    num_bytes: int
    users: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens from the prompt's first to its own last."""
        return self.begins + len(self.token_ids)

    def first_tokens(self, count: int) -> tuple[int, ...]:
        """The first of its prompt, at most `num_tokens` of them."""
        own = self.token_ids[: max(0, count - self.begins)]
        return own if self.before is None else self.before.first_tokens(min(count, self.begins)) + own

    def line(self) -> Iterator[Document]:
        """It and what it goes on from, up to the root."""
        document: Document | None = self
        while document is not None:
            yield document
            document = document.before


class Documents:
    """The documents of one engine, at most `max_bytes` of them on each rank.

    A document is `reserve`d when the prefill that will leave it begins, and `keep`s or `forget`s its place
    when that has ended; until then nobody finds it. Documents named by `take_forgotten` are gone.

    num_bytes: of all of them. free_bytes: of those that nobody reads now. version: another one whenever
    something else may be found.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.free_bytes = 0
        self.version = 0
        self._kept: OrderedDict[int, Document] = OrderedDict()  # the least recently used first
        self._reserved: dict[int, Document] = {}
        # By what they go on from (the layers at the root), after how many tokens, with which token.
        self._next: dict[tuple[Document | Layers, int, int], list[Document]] = {}
        # By their layers and the first LEAST_TOKENS of their prompt: those that hold the last of these. Most
        # prompts begin with a template, so their first token tells few of them apart.
        self._beginnings: dict[tuple[Layers, tuple[int, ...]], list[Document]] = {}
        self._num_next: dict[int, int] = {}
        self._forgotten: list[int] = []
        self._names = 0

    def find(
        self, token_ids: tuple[int, ...], layers: Layers, limit: int, least: int = 1, block_tokens: int = 1
    ) -> tuple[Document | None, int]:
        """The document with the longest common beginning, and its length, at most `limit` tokens.

        layers: those that the beginning has to have run. least: shorter ones are not wanted: (None, 0).
        block_tokens: the length is a multiple of it; all that is kept of these layers ends at one.
        """
        if limit < least:
            return None, 0
        found, length = None, 0
        place: Document | Layers = layers
        while length < limit:
            if length == 0 and least >= LEAST_TOKENS:
                after = self._beginnings.get((layers, token_ids[:LEAST_TOKENS]))
            else:
                after = self._next.get((place, length, token_ids[length]))
            if not after:
                break
            for each in after:
                end = each.begins + _common(each.token_ids, token_ids, each.begins, limit)
                end -= end % block_tokens
                if end > length:
                    found, length = each, end
            if found is None or found is place:  # no whole block more
                break
            place = found
        return (found, length) if length >= least else (None, 0)

    def use(self, document: Document, by: int) -> None:
        """Count `by` more users: 1 before, -1 after. It becomes the most recently used."""
        for each in document.line():  # what it goes on from last, so that the tree is left from its leaves
            was_free = not each.users
            each.users += by
            if each.name in self._kept:
                self.free_bytes += each.num_bytes * ((not each.users) - was_free)
                self._kept.move_to_end(each.name)

    def reserve(
        self,
        token_ids: tuple[int, ...],
        layers: Layers,
        before: Document | None,
        begins: int,
        num_bytes: int,
    ) -> Document:
        """Count a document that a prefill will leave: `token_ids` after the first `begins` of `before`."""
        self._names += 1
        document = Document(
            name=self._names,
            layers=layers,
            before=before if begins else None,
            begins=begins,
            token_ids=token_ids,
            num_bytes=num_bytes,
        )
        if document.before is not None:
            self.use(document.before, 1)
        self.num_bytes += num_bytes
        self._reserved[document.name] = document
        return document

    def keep(self, name: int) -> None:
        """The ranks hold it now. One with the same tokens may have come first: then it is forgotten."""
        document = self._reserved.pop(name, None)
        if document is None:
            return
        if document.before is not None:
            self.use(document.before, -1)
        alike = self._next.setdefault(self._place(document), [])
        size = len(document.token_ids)
        if any(each.token_ids[:size] == document.token_ids for each in alike):
            self.num_bytes -= document.num_bytes
            self._forgotten.append(name)
            return
        alike.append(document)
        if (beginning := self._beginning(document)) is not None:
            self._beginnings.setdefault(beginning, []).append(document)
        self._kept[name] = document
        self.free_bytes += document.num_bytes
        self.version += 1
        if document.before is not None:
            self._num_next[document.before.name] = self._num_next.get(document.before.name, 0) + 1
            self.use(document.before, 0)

    def abandon(self, name: int) -> None:
        """Its prefill ended early, so no rank holds it."""
        document = self._reserved.pop(name, None)
        if document is not None:
            self.num_bytes -= document.num_bytes
            if document.before is not None:
                self.use(document.before, -1)

    def shrink(self, max_bytes: int) -> None:
        """Forget the least recently used, leaves first, until they are at most `max_bytes`, or all in use."""
        while self.num_bytes > max_bytes:
            free = (each for each in self._kept.values() if not each.users)
            leaf = next((each for each in free if not self._num_next.get(each.name)), None)
            if leaf is None:
                return
            self._drop(leaf)

    def take_forgotten(self) -> tuple[int, ...]:
        """Names that ranks are to drop, said once."""
        forgotten, self._forgotten = tuple(self._forgotten), []
        return forgotten

    def _drop(self, document: Document) -> None:
        del self._kept[document.name]
        place = self._place(document)
        self._next[place].remove(document)
        if not self._next[place]:
            del self._next[place]
        if (beginning := self._beginning(document)) is not None:
            self._beginnings[beginning].remove(document)
            if not self._beginnings[beginning]:
                del self._beginnings[beginning]
        self._num_next.pop(document.name, None)
        if document.before is not None:
            self._num_next[document.before.name] -= 1
        self.num_bytes -= document.num_bytes
        self.free_bytes -= document.num_bytes
        self.version += 1
        self._forgotten.append(document.name)

    @staticmethod
    def _beginning(document: Document) -> tuple[Layers, tuple[int, ...]] | None:
        if document.begins < LEAST_TOKENS <= document.num_tokens:
            return document.layers, document.first_tokens(LEAST_TOKENS)
        return None

    @staticmethod
    def _place(document: Document) -> tuple[Document | Layers, int, int]:
        return (
            document.layers if document.before is None else document.before,
            document.begins,
            document.token_ids[0],
        )


def _common(ours: tuple[int, ...], theirs: tuple[int, ...], start: int, limit: int) -> int:
    """How many tokens `ours` begins with that `theirs[start:limit]` begins with too."""
    size = min(len(ours), limit - start)
    length = 0
    while length < size:
        block = min(LEAST_TOKENS, size - length)
        if ours[length : length + block] == theirs[start + length : start + length + block]:
            length += block
        elif ours[length] == theirs[start + length]:
            length, size = length + 1, min(size, length + block)
        else:
            break
    return length
