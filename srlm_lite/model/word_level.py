"""Word-level bases of about a million parameters, pretrained in minutes on one core.

The scripts beside the toy recipes make their bases with it: a tokenizer of a given vocabulary, and
a Llama that learns to reply.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
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


def pretrain(
    directory: Path,
    tokenizer: Any,
    dialogues: Iterator[tuple[str, str]],
    *,
    seed: int,
    steps: int,
    batch: int,
    threads: int,
    whole: bool = False,
    begin: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Pretrain a Llama on (user, assistant) turns, and save it with its tokenizer, in bf16.

    Deterministic for a seed and thread count on one machine.

    Args:
        whole: Learn the user's turns as well: what is copied within them teaches to copy.
        begin: A base to go on from; None: random weights.
        tell: Given a line every hundred steps.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = hf.LlamaForCausalLM(config)
    if begin is not None:
        model = hf.LlamaForCausalLM.from_pretrained(begin, dtype=torch.float32)
    # One length-sorted block is cut into batches, so that little of a batch is padding.
    block: list[tuple[list[int], int]] = []
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    started, tokens, recent = time.monotonic(), 0, 0.0
    for step in range(steps):
        if not block:
            texts = [next(dialogues) for _ in range(16 * batch)]
            block = sorted(_encode(tokenizer, texts), key=lambda row: len(row[0]))
            batches = [block[at : at + batch] for at in range(0, len(block), batch)]
            order.shuffle(batches)
            block = [row for rows in batches for row in rows]
        rows, block = block[:batch], block[batch:]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((batch, width), tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for at, (row, prompt_length) in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            first = 0 if whole else prompt_length
            labels[at, first : len(row)] = ids[at, first : len(row)]
        tokens += sum(len(row) for row, _ in rows)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        # Right-padded and causal: no real token attends to padding, so no mask is needed.
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent += loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            tell(f"step {step + 1} loss {recent / 100:.4f} tokens {tokens} {seconds:.0f} s")
            recent = 0.0

    model.to(torch.bfloat16)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def _encode(tokenizer: Any, turns: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """(ids, number of prompt ids) of each dialogue, exactly as the chat template renders it."""
    prompts = [[{"role": "user", "content": user}] for user, _ in turns]
    heads = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    head_ids = tokenizer(heads, add_special_tokens=False)["input_ids"]
    replies = [reply + tokenizer.eos_token for _, reply in turns]
    reply_ids = tokenizer(replies, add_special_tokens=False)["input_ids"]
    return [(head + reply, len(head)) for head, reply in zip(head_ids, reply_ids, strict=True)]


def _learning_rate(step: int, steps: int, *, peak: float = 3e-3, warmup: int = 40) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
