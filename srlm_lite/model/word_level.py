"""Word-level bases of about a million parameters, pretrained in minutes on one core.

The scripts beside the toy recipes make their bases with it: a tokenizer of a given vocabulary, and
a Llama that learns to reply.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

hf: Any = transformers  # only partly typed

WINDOW = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('the toy base knows the roles user and assistant only') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def make_tokenizer(vocabulary: Sequence[str], *, marks: str, numbers: bool = False) -> Any:
    """A fast word-level tokenizer; decoding restores the text's spacing.

    Args:
        vocabulary: Special tokens first, then words, single digits and marks.
        marks: Those that stand right behind a word.
        numbers: Whether digits behind one another are one number, so that `1 2` decodes as `12`.
    """
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Split(Regex(r"[A-Za-z]+|[0-9]|[^A-Za-z0-9]"), behavior="isolated"),
        ]
    )
    joined = [decoders.Replace(Regex(r"(?<=[0-9]) (?=[0-9])"), "")] if numbers else []
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" ?\n ?"), "\n"),
            *(decoders.Replace(f" {mark}", mark) for mark in marks),
            *joined,
        ]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        model_max_length=WINDOW,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


class Dialogue(NamedTuple):
    """A user's turn and the reply that a base learns."""

    user: str
    reply: str
    verdicts: tuple[str, ...] = ()
    """What is to be said after each of the user's last tokens, in place of the token that follows:
    a judge learns so, at every token, whether all is right up to it."""
    weight: float = 1.0
    """How much a token of the reply counts."""


class Size(NamedTuple):
    """How large a base is."""

    layers: int = 4
    width: int = 128
    inner: int = 384
    """Width of the layers between."""


TOY_SIZE = Size()
SAVED_EVERY = 120
"""Seconds after which a pretraining can go on where it was."""
PEAKS = (3e-3, 1.5e-2)
"""The highest learning rates: of AdamW, and of Muon."""


def pretrain(
    directory: Path,
    tokenizer: Any,
    dialogue: Callable[[random.Random, float], Dialogue],
    *,
    rng: random.Random,
    seed: int,
    steps: int,
    batch: int,
    threads: int,
    size: Size = TOY_SIZE,
    user_weight: float = 0.0,
    verdict_weight: float = 1.0,
    orthogonal: bool = False,
    progress: Path | None = None,
    minutes: float = math.inf,
    tell: Callable[[str], None] = lambda line: None,
) -> bool:
    """Pretrain a Llama on dialogues, and save it with its tokenizer, in bf16.

    Deterministic for a seed and thread count on one machine, stopped between or not.

    Args:
        dialogue: Draws one, all of it from the generator that it is given; the number is how much
            of the pretraining is done, 0 to 1.
        user_weight: How much a token of the user's turn counts: what is copied within it teaches
            to copy.
        verdict_weight: How much one of `Dialogue.verdicts` counts.
        orthogonal: Train the matrices within the layers with Muon (Jordan et al. 2024,
            https://kellerjordan.github.io/posts/muon/), in place of AdamW.
        progress: File to go on from, written every two minutes and removed at the end.
        minutes: Stop after about that many, to go on another time; needs `progress`.
        tell: Given a line every hundred steps.

    Returns:
        Whether all steps are done.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = hf.LlamaForCausalLM(config)
    order = random.Random(seed)
    optimizers = _optimizers(model, orthogonal=orthogonal)
    step, tokens = 0, 0
    if progress is not None and progress.exists():
        kept = torch.load(progress, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        rng.setstate(kept["rng"])
        order.setstate(kept["order"])
        step, tokens = kept["step"], kept["tokens"]
        tell(f"goes on from step {step}")
    started = written = time.monotonic()
    recent: list[float] = []
    while step < steps:
        # One length-sorted block is cut into batches, so that little of a batch is padding.
        block = [dialogue(rng, step / steps) for _ in range(16 * batch)]
        encoded = sorted(encode(tokenizer, block, user_weight, verdict_weight), key=_length)
        batches = [encoded[at : at + batch] for at in range(0, len(encoded), batch)]
        order.shuffle(batches)
        for rows in batches[: steps - step]:
            rate = _learning_rate(step, steps)
            for optimizer, peak in zip(optimizers, PEAKS, strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate
            ids, targets, weights = _padded(rows, tokenizer.pad_token_id)
            # Right-padded and causal: no real token attends to padding, so no mask is needed.
            logits = model(input_ids=ids).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            loss: Any = (losses * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            recent.append(loss.item())
            tokens += sum(map(_length, rows))
            step += 1
            if step % 100 == 0:
                seconds = time.monotonic() - started
                tell(f"step {step} loss {fmean(recent):.4f} tokens {tokens} {seconds:.0f} s")
                recent = []
        now = time.monotonic()
        stops = now - started > 60 * minutes and step < steps
        if progress is not None and (stops or now - written > SAVED_EVERY):
            kept = {
                "model": model.state_dict(), "optimizers": [one.state_dict() for one in optimizers],
                "rng": rng.getstate(), "order": order.getstate(), "step": step, "tokens": tokens,
            }  # fmt: skip
            progress.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, progress.with_suffix(".part"))
            progress.with_suffix(".part").replace(progress)
            written = now
            if stops:
                tell(f"stopped at step {step} of {steps}; the same command goes on")
                return False

    model.to(torch.bfloat16)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    if progress is not None:
        progress.unlink(missing_ok=True)
    return True


class Encoded(NamedTuple):
    ids: list[int]
    targets: list[int]
    """By token but the last, what is to follow it."""
    weights: list[float]
    """By target, how much it counts."""


def encode(
    tokenizer: Any, dialogues: Sequence[Dialogue], user_weight: float, verdict_weight: float
) -> list[Encoded]:
    """Ids of each dialogue, exactly as the chat template renders it, and what is learned."""
    prompts = [[{"role": "user", "content": one.user}] for one in dialogues]
    heads = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    head_ids = tokenizer(heads, add_special_tokens=False)["input_ids"]
    replies = [one.reply + tokenizer.eos_token for one in dialogues]
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    encoded = []
    for one, head, reply in zip(dialogues, head_ids, reply_ids, strict=True):
        ids = head + reply
        targets = ids[1:]
        weights = [user_weight] * (len(head) - 1) + [one.weight] * len(reply)
        if one.verdicts:
            # The turn's last token stands before the token that opens the reply.
            last = slice(len(head) - 1 - len(one.verdicts), len(head) - 1)
            targets[last] = tokenizer.convert_tokens_to_ids(one.verdicts)
            weights[last] = [verdict_weight] * len(one.verdicts)
        encoded.append(Encoded(ids, targets, weights))
    return encoded


def _length(row: Encoded) -> int:
    return len(row.ids)


def _padded(rows: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, and one shorter targets and weights, filled up on the right."""
    width = max(map(_length, rows))
    ids = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width - 1), pad)
    weights = torch.zeros(len(rows), width - 1)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        targets[at, : len(row.targets)] = torch.tensor(row.targets)
        weights[at, : len(row.weights)] = torch.tensor(row.weights)
    return ids, targets, weights


def _optimizers(model: Any, *, orthogonal: bool) -> list[torch.optim.Optimizer]:
    inner: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        within = orthogonal and parameter.ndim == 2 and "layers" in name
        (inner if within else others).append(parameter)
    first = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    return [first, torch.optim.Muon(inner, lr=0.0, weight_decay=0.01)] if inner else [first]


def _learning_rate(step: int, steps: int, *, warmup: int = 40) -> float:
    """Share of the highest one."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
