"""The demo model's tokenizer: byte-level BPE over the text and the needles that the model is trained on."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jobs.tasks.haystack import haystack
from jobs.tasks.needle import ask, chain, fact, words

END = "<|endoftext|>"
END_ID = 0
VOCAB_SIZE = 6144
CONTEXT = 8448
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
_NOUN_REPEATS = 2_000  # often enough that every noun is merged into one token
_QUESTION_REPEATS = 20_000


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the haystack; lines never share a token, and each noun of the needles is one token.

    Raises:
        RuntimeError: a noun was split.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    nouns = [f" {word} {word}." for word in words()] * _NOUN_REPEATS
    questions = [ask(kind(list(words())).question) for kind in (fact, chain)] * _QUESTION_REPEATS
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(
        (text for part in (haystack("train"), nouns, questions) for text in part), trainer
    )
    split = [word for word in words() if len(bpe.encode(f" {word}").ids) != 1]
    if split:
        raise RuntimeError(f"nouns must be one token each, but these are split: {split[:10]}")
    return as_transformers(bpe)


def as_transformers(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with its special token, context length and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
