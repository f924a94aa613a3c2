"""Trains the bundled demo model from a seed: `python -m jobs.train_demo --out jobs/demo_model --minutes 25`.

The model retrieves words from long real text (jobs.tasks.needle). What a small model must be taught on purpose, so that
it can show what token skipping does, is *where in depth* it retrieves (docs/demo_model.md):

- Layers below FIRST_GLOBAL_LAYER see only a short window while training, then everything in the last part. So the
  needles' own tokens learn what they say early, and nobody looks at them from afar before FIRST_GLOBAL_LAYER.
- The language-model head is also put on middle layers at the answers, so that lookups are done by then.

Shapes: B sequences, N tokens, D hidden size, H heads, K key/value heads, d head size, V vocabulary, S supervised places.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from jobs.tasks.haystack import haystack, haystack_hash
from jobs.tasks.needle import NUM_VALUES, Needle, ask, chain, fact, hide, words

END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
VOCAB_SIZE = 6144
CONTEXT = 8448
FIRST_GLOBAL_LAYER = 4
WINDOW = 32
SUPERVISED_LAYERS = (6, 8)
ROPE_THETA = 1e7
LOOK_BACK = ((1, 2), (2, 4))  # tokens that the key/value heads of layers 0 and 1 look back, at initialisation
LOOK_BACK_AMPLITUDE = 8.0
LOOKUP_LAYERS = (4, 5)
MATCH_GAIN = 2.2
EMBEDDING_STD = 0.06
IGNORED = -100


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the haystack; lines never share a token, and each noun of the needles is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    needles = [f" {word} {word}." for word in words()] * 2000
    questions = [ask(question(list(words())).question) for question in (fact, chain)] * 20000
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator((text for part in (haystack("train"), needles, questions) for text in part), trainer)
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


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of (tokens [B, N+1], answers [B, N]) of one length each; answers are targets or IGNORED."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, tokens_per_batch: int, phase: Phase, seed: int) -> None:
        self.phase, self.seed, self.tokens_per_batch = phase, seed, tokens_per_batch
        self.encode = tokenizer.backend_tokenizer.encode
        self.end = tokenizer.eos_token_id
        self.newline = self.encode("\n").ids
        text = tokenizer.backend_tokenizer.encode_batch_fast(list(haystack("train")))
        lengths = np.array([len(line.ids) + 1 for line in text])
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.text = np.concatenate([np.array(line.ids + self.newline, dtype=np.int64) for line in text])

    def _needles(self, rng: random.Random, room: int) -> list[Needle]:
        nouns = rng.sample(words(), k=len(words()))
        kinds = rng.choice(("single", "facts", "values", "chains", "chains", "mixed"))
        most = max(1, min(12, room // 30))
        match kinds:
            case "single":
                return [fact(nouns)]
            case "facts":
                return [fact(nouns) for _ in range(rng.randint(1, most))]
            case "values":
                return [fact(nouns, NUM_VALUES) for _ in range(rng.randint(1, max(1, most // 3)))]
            case "chains":
                return [chain(nouns) for _ in range(rng.randint(1, max(1, most * 2 // 3)))]
        mixed = [fact(nouns), fact(nouns, NUM_VALUES), chain(nouns), chain(nouns)]
        return rng.sample(mixed, k=min(len(mixed), max(1, most // 3)))

    def _sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        needles = self._needles(rng, length)
        asked = rng.sample(needles, k=min(len(needles), rng.randint(1, 8)))
        tail: list[int] = []
        supervised: list[int] = []
        for needle in asked:
            tail += self.encode(ask(needle.question)).ids
            answers = list(needle.answers)
            rng.shuffle(answers)
            answer = self.encode(" " + ", ".join(answers)).ids + [self.end]
            supervised += range(len(tail), len(tail) + len(answer))
            tail += answer
        hidden = [self.encode(line).ids + self.newline for needle in needles for line in needle.lines]
        room = length + 1 - len(tail) - sum(map(len, hidden))
        first = rng.randrange(len(self.starts) - 1)
        if self.starts[-1] - self.starts[first] < room + 200:
            first = 0
        last = int(np.searchsorted(self.starts, self.starts[first] + room, side="right")) - 1
        lines, _ = hide(rng, range(first, last), range(-len(hidden), 0))  # type: ignore[arg-type]
        pieces: list[np.ndarray] = []
        run = first
        for place, line in enumerate(lines):
            if line < 0:  # type: ignore[operator]
                pieces.append(np.array(hidden[line], dtype=np.int64))  # type: ignore[call-overload]
            elif place == 0 or lines[place - 1] < 0:  # type: ignore[operator]
                run = line  # type: ignore[assignment]
                end = next((p for p in range(place, len(lines)) if lines[p] < 0), len(lines))  # type: ignore[operator]
                pieces.append(self.text[self.starts[run] : self.starts[run + end - place]])
        body = np.concatenate([*pieces, np.array(tail, dtype=np.int64)])
        tokens = np.full(length + 1, self.end, dtype=np.int64)
        tokens[length + 1 - len(body) :] = body  # a few tokens short of the length: padded on the left
        targets = np.full(length, IGNORED, dtype=np.int64)
        places = length - len(tail) + np.array(supervised)
        targets[places] = tokens[places + 1]
        return tokens, targets

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}/{self.phase.name}/{worker.id if worker else 0}")
        while True:
            length = rng.choices(self.phase.lengths, weights=self.phase.weights)[0]
            sequences = [self._sequence(rng, length) for _ in range(self.tokens_per_batch // length)]
            yield (
                torch.from_numpy(np.stack([tokens for tokens, _ in sequences])),
                torch.from_numpy(np.stack([targets for _, targets in sequences])),
            )


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the training: its share of the time, prompt lengths and how often each, and whether windows are on.

    `enough`: smoothed accuracy of the answers' first tokens that ends the phase early. A third of a right answer is
    what a question with three values can give, so about 0.86 is perfect.
    """

    name: str
    share: float
    enough: float = 1.0
    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    windowed: bool
    peak_lr: float
    final_lr: float


PHASES = (
    Phase(name="form", share=0.40, enough=0.8, lengths=(128, 256), weights=(1, 1), windowed=True, peak_lr=1e-3, final_lr=1e-3),
    Phase(
        name="stretch", share=0.60, lengths=(256, 1024, 2048, 4096, 8192), weights=(1, 1, 1, 2, 2), windowed=True,
        peak_lr=1e-3, final_lr=5e-4,
    ),
    Phase(
        name="open", share=0.40, lengths=(256, 1024, 2048, 4096, 8192), weights=(1, 1, 1, 2, 3), windowed=False,
        peak_lr=5e-4, final_lr=2e-5,
    ),
)  # fmt: skip


def new_model(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 that starts out with a lookup circuit, which training then sharpens and stretches (docs/demo_model.md).

    The residual stream has three parts at the start: what a token is (half of it), what stands two tokens before it (a
    quarter, written by layer 0) and what stands four before it (a quarter, written by layer 1). A needle's value stands
    two tokens after its key, a prompt's last token four after the key it asks for. So the heads of LOOKUP_LAYERS, which
    match one against the other and copy what the token found is, answer one hop each.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        use_sliding_window=False,
    )
    model = Qwen2ForCausalLM(config)
    layers = model.model.layers
    D, d = config.hidden_size, config.hidden_size // config.num_attention_heads
    token, two_back, four_back = slice(0, D // 2), slice(D // 2, D // 2 + d), slice(D // 2 + d, D)
    identity = nn.init.orthogonal_(torch.empty(d, D // 2))  # what of a token's identity is copied and compared
    frequency = ROPE_THETA ** (-torch.arange(0, d, 2) / d)
    near = LOOK_BACK_AMPLITUDE * (frequency > 1 / 300)  # slower pairs say nothing about near offsets
    far = (frequency * CONTEXT < 1).nonzero().flatten()  # pairs that hardly turn within the context
    compared = torch.cat([far, far + d // 2])
    matching = nn.init.orthogonal_(torch.empty(len(compared), d)) * MATCH_GAIN

    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, token].normal_(std=EMBEDDING_STD)
        embedding[:, D // 2 :].normal_(std=EMBEDDING_STD / 10)
        for layer in layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        for layer, offsets in zip(layers, LOOK_BACK, strict=False):
            for kv, back in enumerate(offsets):
                # Over the offset m - n the score is sum_i a_i^2 cos((m - n - back) f_i) / sqrt(d), highest at `back`.
                key = torch.cat([near, torch.zeros(d // 2)])
                query = torch.cat([near * torch.cos(back * frequency), -near * torch.sin(back * frequency)])
                layer.self_attn.k_proj.bias[kv * d : (kv + 1) * d] = key
                layer.self_attn.q_proj.bias[2 * kv * d : 2 * (kv + 1) * d] = query.repeat(2)

        def copy(index: int, head: int, to: slice | None, gain: float) -> None:
            attention, kv = layers[index].self_attn, head // 2
            attention.v_proj.weight[kv * d : (kv + 1) * d] = 0
            attention.v_proj.weight[kv * d : (kv + 1) * d, token] = identity
            attention.o_proj.weight[:, 2 * kv * d : 2 * (kv + 1) * d] = 0  # both heads that read these values
            target = attention.o_proj.weight[token if to is None else to, head * d : (head + 1) * d]
            target.copy_(gain * (identity.T if to is None else torch.eye(d)))

        copy(0, head=2, to=two_back, gain=0.7 * EMBEDDING_STD)
        copy(1, head=2, to=four_back, gain=0.85 * EMBEDDING_STD)
        for hop, index in enumerate(LOOKUP_LAYERS):
            attention = layers[index].self_attn
            attention.q_proj.weight[compared] = 0
            attention.k_proj.weight[compared] = 0
            attention.k_proj.weight[compared, two_back] = matching
            if hop == 0:
                attention.q_proj.weight[compared, four_back] = matching
            else:
                attention.q_proj.weight[compared, token] = matching @ identity
            copy(index, head=0, to=None, gain=2 * EMBEDDING_STD)
    return model


def window_attention(q_BHNd: Tensor, k_BHNd: Tensor, v_BHNd: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` tokens: each block of `window` queries sees itself and the block before."""
    B, H, N, d = q_BHNd.shape
    blocks = N // window

    def pairs(x: Tensor) -> Tensor:
        x = x.reshape(B, -1, blocks, window, d)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3).transpose(1, 2).flatten(0, 1)

    q = q_BHNd.reshape(B, H, blocks, window, d).transpose(1, 2).flatten(0, 1)
    offset = torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)[None]
    visible = ((offset >= 0) & (offset < window)).expand(blocks, 1, window, 2 * window).clone()
    visible[0, :, :, :window] = False
    out = F.scaled_dot_product_attention(q, pairs(k_BHNd), pairs(v_BHNd), attn_mask=visible.repeat(B, 1, 1, 1))
    return out.reshape(B, blocks, H, window, d).transpose(1, 2).reshape(B, H, N, d)


class Trainer:
    """The forward pass with windows and supervised middle layers; parts that do not depend on N are compiled."""

    def __init__(self, model: Qwen2ForCausalLM, *, colon: int, compiled: bool) -> None:
        self.model, self.colon = model, colon
        wrap = torch.compile if compiled else (lambda function: function)
        self.before = wrap(self._before)
        self.after = wrap(self._after)
        self.token_losses = wrap(self._token_losses)

    @staticmethod
    def _before(layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = layer.input_layernorm(x)
        heads = [
            proj(h).unflatten(-1, (-1, 64)).transpose(0, 1)[None]
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        q, k = apply_rotary_pos_emb(heads[0], heads[1], cos[None], sin[None])
        return q[0].transpose(0, 1), k[0].transpose(0, 1), heads[2][0].transpose(0, 1)

    @staticmethod
    def _after(layer: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.self_attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _token_losses(self, x_SD: Tensor, targets_S: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.model.norm(x_SD))
        return F.cross_entropy(logits.float(), targets_S, reduction="none")

    def losses(self, tokens: Tensor, targets: Tensor, *, windowed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Answer loss (all supervised layers), language-model loss and the accuracy of answer tokens."""
        inputs, (B, N) = tokens[:, :-1], targets.shape
        position = torch.arange(N, device=inputs.device)[None]
        x = self.model.model.embed_tokens(inputs)
        cos, sin = self.model.model.rotary_emb(x, position)
        x, cos, sin = x.flatten(0, 1), cos[0].repeat(B, 1), sin[0].repeat(B, 1)
        place = (targets.flatten() != IGNORED).nonzero().squeeze(1)
        wanted = targets.flatten()[place]
        answer_loss = torch.zeros((), device=x.device)
        for index, layer in enumerate(self.model.model.layers):
            q, k, v = (t.unflatten(0, (B, N)).transpose(1, 2) for t in self.before(layer, x, cos, sin))
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            if windowed and index < FIRST_GLOBAL_LAYER:
                attended = window_attention(q, k, v, WINDOW)
            else:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.after(layer, x, attended.transpose(1, 2).flatten(2).flatten(0, 1))
            if index in SUPERVISED_LAYERS:
                answer_loss = answer_loss + 0.5 * self._token_losses(x[place], wanted).mean()
        last = x[place]
        answer_loss = answer_loss + self._token_losses(last, wanted).mean()
        with torch.no_grad():
            right = (self.model.lm_head(self.model.model.norm(last)).argmax(-1) == wanted)
            right = right[inputs.flatten()[place] == self.colon].float().mean()
        read = torch.randint(0, B * N, (B * N // 4,), device=x.device)
        text_loss = self.token_losses(x[read], tokens[:, 1:].flatten()[read]).mean()
        return answer_loss, text_loss, right


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, history: list[dict]) -> None:
    """Writes the model folder in bfloat16; the model in training keeps its precision."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen2ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(folder, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(history, indent=1))


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        model = Qwen2ForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.tokenizer) if args.tokenizer else train_tokenizer()
        model = new_model(args.seed)
    model.to(device)
    model.config._attn_implementation = "sdpa"
    trainer = Trainer(model, colon=tokenizer.encode(":")[0], compiled=device.type == "cuda")
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    history: list[dict] = []
    step, began = 0, time.monotonic()
    phases = [phase for phase in PHASES if not args.phases or phase.name in args.phases]
    for index, phase in enumerate(phases):
        data = Batches(tokenizer, tokens_per_batch=args.batch_tokens, phase=phase, seed=args.seed)
        loader = iter(
            torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers, pin_memory=device.type == "cuda")
        )
        phase_began, accuracy = time.monotonic(), 0.0
        left = 60 * args.minutes - (phase_began - began)
        seconds = left if index == len(phases) - 1 else left * phase.share
        phase_step, logged = 0, time.monotonic()
        while (done := (time.monotonic() - phase_began) / seconds) < 1:
            tokens, targets = (t.to(device, non_blocking=True) for t in next(loader))
            lr = phase.peak_lr * (phase.final_lr / phase.peak_lr) ** done * min(1.0, (phase_step + 1) / args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                answer_loss, text_loss, right = trainer.losses(tokens, targets, windowed=phase.windowed)
            optimizer.zero_grad(set_to_none=True)
            (answer_loss + args.text_weight * text_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, phase_step = step + 1, phase_step + 1
            if phase_step % args.log_every == 0:
                rate = args.log_every * tokens[:, 1:].numel() / (time.monotonic() - logged)
                logged = time.monotonic()
                row = {
                    "phase": phase.name, "step": step, "minutes": round((time.monotonic() - began) / 60, 2),
                    "length": targets.shape[1], "answer_loss": round(answer_loss.item(), 3),
                    "text_loss": round(text_loss.item(), 3), "answer_accuracy": round(right.item(), 3),
                    "lr": round(lr, 6), "tokens_per_s": int(rate),
                }  # fmt: skip
                if not math.isfinite(row["answer_loss"]):
                    raise RuntimeError(f"loss must stay finite, got {row}; lower the learning rate")
                accuracy = 0.8 * accuracy + 0.2 * row["answer_accuracy"]
                history.append(row)
                print(json.dumps(row), flush=True)
                if accuracy >= phase.enough:
                    break
        save(model, tokenizer, Path(args.out), history)
        if phase.enough < 1 and accuracy < 0.5:
            raise SystemExit(f"phase {phase.name!r} must reach an accuracy of 0.5, got {accuracy:.2f}; give it more minutes")
    print(json.dumps({"steps": step, "seconds": time.monotonic() - began, "haystack": haystack_hash("train")}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument("--resume", help="model folder to start from")
    parser.add_argument("--tokenizer", help="model folder whose tokenizer to use instead of training one")
    parser.add_argument("--phases", nargs="*", help="only these phases, in order")
    parser.add_argument("--minutes", type=float, default=8.4, help="training time, without set-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--text-weight", type=float, default=0.15)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--workers", type=int, default=12, help="processes that make batches")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
