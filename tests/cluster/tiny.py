"""A tiny random Qwen2 model folder with proxies and a small BPE tokenizer: every part real, nothing
downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from spts.schedule import Schedule, Stage

NUM_LAYERS = 6
CONTEXT = 512
SCHEDULE = Schedule(
    num_layers=NUM_LAYERS,
    first_skip_layer=2,
    stages=(
        Stage(last_layer=3, active_tokens=40, keep_tokens=30),
        Stage(last_layer=4, active_tokens=20, keep_tokens=None),
    ),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE trained on a few sentences, with a chat template; returns the vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and the hen " * 4], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "chat_template": CHAT_TEMPLATE,
                "model_max_length": CONTEXT,
            }
        )
    )
    return tokenizer.get_vocab_size()


def write_model(folder: Path, *, seed: int = 0, proxies: bool = True) -> Path:
    """Random weights, large enough that greedy choices are not ties; 4 query heads on 2 key/value heads."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import spts

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    # The end token never wins, so that lengths in tests are what they ask for.
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    if proxies:
        loaded = spts.load(folder)
        texts = [torch.randint(1, vocab_size, (200,)).tolist()]
        spts.Proxies.fit(loaded, texts, first_layer=2, channels=48, rank=16).save(folder / "proxies")
    return folder
