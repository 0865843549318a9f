"""How likely a model finds texts: no training, one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from trl.trainer.utils import selective_log_softmax

from srlm_lite.model.base import LoadedBase
from srlm_lite.model.stack import Adapter, Slot
from srlm_lite.training.sft import Example


@torch.inference_mode()
def log_likelihoods(
    slot: Slot,
    base: LoadedBase,
    stack: Sequence[Adapter],
    examples: Sequence[Example],
    *,
    batch_rows: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """The log-likelihood of each target after its prompt, in nats, summed over its tokens."""
    slot.load(stack)
    found = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        width = len(examples[batch[0]])
        ids = torch.full((len(batch), width), int(base.tokenizer.pad_token_id or 0))
        mask, attention = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, i in enumerate(batch):
            prompt, length = len(examples[i].prompt_ids), len(examples[i])
            ids[row, :length] = torch.tensor([*examples[i].prompt_ids, *examples[i].target_ids])
            attention[row, :length] = 1
            mask[row, prompt:length] = 1
        ids, mask = ids.to(base.device), mask.to(base.device)
        logits = slot.model(
            input_ids=ids, attention_mask=attention.to(base.device), use_cache=False
        ).logits
        tokens = selective_log_softmax(
            logits[:, :-1].float(), ids[:, 1:], row_mask=mask[:, 1:]
        ).sum(dim=1)
        for i, value in zip(batch, tokens.tolist(), strict=True):
            found[i] = value
        on_rows(len(batch))
    return found
