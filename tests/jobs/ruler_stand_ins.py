"""Stand-ins for what RULER's tasks are made with: wording of our own, and two extreme tokenizers."""

from __future__ import annotations

# Our own words in the places of RULER's.
TEXTS = {
    "niah": "Some {type_needle_v} are below.\n{context}\nWhat are all {type_needle_v} of {query}?",
    "niah_answer": " The {type_needle_v} of {query} are",
    "needle": "Note: {type_needle_v} of {key} = {value}.",
    "noise": "The cat sleeps. The dog barks.",
    "vt": "Follow.\n{context}\nWhich have {query}?",
    "vt_answer": " These {num_v} have {query}: ",
    "cwe": "Count.\n{context}\nWhich are common?",
    "cwe_answer": " Common:",
    "fwe": "Count. {context}\nWhich are frequent?",
    "fwe_answer": " Frequent:",
    "qa": "Read.\n{context}\nAnswer: {query}",
    "qa_answer": " It is",
    "document": "No. {i}:\n{document}",
}


class Bytes:
    """A token a byte: the most tokens that a text can have."""

    def count(self, text: str) -> int:
        return len(text.encode())

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids) -> str:
        return bytes(token_ids).decode()


class Words(Bytes):
    """A token a word: the fewest."""

    def count(self, text: str) -> int:
        return len(text.split())

    def encode(self, text: str) -> list[int]:
        return [0] * len(text.split())
