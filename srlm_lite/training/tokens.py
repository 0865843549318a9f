"""Log-likelihoods of target tokens as the model itself finds them, the logits of a few at a time.

Between the last hidden states and the logits families differ: Granite divides, Cohere and Falcon-H1
multiply, MiniCPM3 scales the states, Gemma 2 caps the result. So no head is rebuilt here. The
model's own forward pass is run with something in the place of its backbone: first to learn what
goes in and comes out of it, then with a piece of that output, as if the backbone had given no more.
Where a family's code does not allow that, its logits are computed whole: right, and more memory.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import modeling_outputs

from srlm_lite.errors import ProofError
from srlm_lite.training.sizes import PIECE

IGNORED = -100
"""In labels: a token that is no target."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""By which a loss may miss the model's own likelihood: so many nats a token, and that share of
them. A batch is padded and the comparison is not, so 16 bits round differently in the two."""

Picking = Callable[[Tensor, Tensor], AbstractContextManager[None]]
"""Says, while the head computes, of which (row, column) its inputs are."""

outputs: Any = modeling_outputs  # only partly typed
logger = logging.getLogger(__name__)


class _Seen(Exception):
    """What the backbone gave: nothing after it needs to be computed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _InItsPlace(nn.Module):
    """Called as the backbone is; all that is asked of it otherwise is the backbone's."""

    def __init__(self, backbone: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)


def _with(model: nn.Module, path: str, other: nn.Module) -> Any:
    """The same model, weights and all, with another module at a path; it is not touched."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    vars(twin).pop("forward", None)  # ours, which asks for this
    name, _, rest = path.partition(".")
    inner: Any = model._modules[name]
    twin._modules[name] = _with(inner, rest, other) if rest else other
    return twin


class TargetTokens:
    """A causal model's forward pass that gives log-likelihoods in place of logits.

    Args:
        model: With adapters; wrapped by PEFT.
        probe: A few ids, on which it is tried out whether pieces give the whole.
        picking: Told of each piece.
    """

    def __init__(self, model: Any, probe: Sequence[int], picking: Picking | None = None) -> None:
        self._causal = model.get_base_model()
        self._picking: Picking = picking or (lambda rows, columns: nullcontext())
        self._names = {id(one): name for name, one in self._causal.named_modules()}
        ids = torch.tensor([list(probe[:16])], device=next(self._causal.parameters()).device)
        with torch.no_grad():
            whole = self._causal(input_ids=ids, use_cache=False).logits[0]
            self._path = next((one for one in self._paths() if self._works(one, ids, whole)), None)
            self._takes_positions = self._keeps_positions(ids, whole)
        if self._path is None:
            logger.info("logits of %s are computed whole", type(self._causal).__name__)

    def _paths(self) -> list[str]:
        """Where the backbone may be: what the forward pass calls differs by family."""
        found = [self._causal.base_model, self._causal.get_decoder()]
        return [name for one in found if (name := self._names.get(id(one)))]

    def _works(self, path: str, ids: Tensor, whole: Tensor) -> bool:
        try:
            output = self._output(path, {"input_ids": ids, "use_cache": False})
            found = self._logits(path, type(output), output.last_hidden_state[0], ids[0])
        except Exception:  # any family's own code
            return False
        return _same(found, whole)

    def _keeps_positions(self, ids: Tensor, whole: Tensor) -> bool:
        if "logits_to_keep" not in inspect.signature(type(self._causal).forward).parameters:
            return False
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        try:
            kept = self._causal(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0]
        except Exception:  # some take a number alone
            return False
        return _same(kept, whole[last])

    def _output(self, path: str, inputs: dict[str, Any]) -> Any:
        """What the backbone gives for a batch, called as the model itself calls it."""
        backbone = self._causal.get_submodule(path)

        def answer(*args: Any, **kwargs: Any) -> Any:
            raise _Seen(backbone(*args, **kwargs))

        try:
            _with(self._causal, path, _InItsPlace(backbone, answer)).forward(**inputs)
        except _Seen as seen:
            return seen.output
        raise TypeError(f"{type(self._causal).__name__} does not call {path}")

    def _logits(self, path: str, kind: Any, states: Tensor, ids: Tensor) -> Tensor:
        """(N, V) logits of N hidden states."""
        backbone = self._causal.get_submodule(path)
        given = kind(last_hidden_state=states[None])
        twin = _with(self._causal, path, _InItsPlace(backbone, lambda *args, **kwargs: given))
        logits: Tensor = twin.forward(input_ids=ids[None], use_cache=False).logits[0]
        return logits

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within this context a forward pass with `labels` (B, T) has as its `logits`, (B, T - 1),
        the log-likelihood of each target after what stands before it, and 0 elsewhere.

        Without labels it is what it was.
        """
        causal, original = self._causal, self._causal.forward
        own = vars(causal).get("forward")

        def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
            if labels is None:
                return original(*args, **kwargs)
            if self._path is None:
                logits = original(*args, **kwargs).logits
                return outputs.CausalLMOutput(logits=_of_targets(logits, labels))
            return outputs.CausalLMOutput(logits=self._by_pieces(self._path, labels, kwargs))

        causal.forward = forward
        try:
            yield
        finally:
            del causal.forward
            if own is not None:
                causal.forward = own

    @torch.no_grad()
    def own(self, model: Any, batch: dict[str, Any], labels: Tensor) -> float:
        """The log-likelihood of a batch's targets, summed, by plain forward passes alone.

        Each sequence is by itself, without its padding, and the model, wrapped or not, is called as
        it is for sampling. Where it can be asked for the logits of some positions, no more than
        `PIECE` are there at once.
        """
        total = 0.0
        for row, mask, label in zip(
            batch["input_ids"], batch["attention_mask"], labels, strict=True
        ):
            ids = row[mask == 1][None]
            columns = (label[mask == 1][1:] != IGNORED).nonzero()[:, 0]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            if self._takes_positions:
                for piece in columns.split(PIECE):
                    logits = model(**inputs, logits_to_keep=piece).logits[0]
                    total += float(_scores(logits, ids[0, piece + 1]).sum())
            else:
                whole = model(**inputs).logits[0]
                for piece in columns.split(PIECE):
                    total += float(_scores(whole[piece], ids[0, piece + 1]).sum())
        return total

    def _by_pieces(self, path: str, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        output = self._output(path, inputs)
        kind, states = type(output), output.last_hidden_state
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets = labels[rows, columns + 1]

        def score(states: Tensor, targets: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            with self._picking(rows, columns):
                return _scores(self._logits(path, kind, states, targets), targets)

        # One piece's logits may stay; those of more are computed again in the backward pass.
        several = torch.is_grad_enabled() and len(targets) > PIECE
        found = []
        for start in range(0, max(1, len(targets)), PIECE):
            part = slice(start, start + PIECE)
            piece = states[rows[part], columns[part]], targets[part], rows[part], columns[part]
            found.append(
                checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False)
                if several
                else score(*piece)
            )
        scores = torch.zeros(labels[:, 1:].shape, device=states.device)
        return scores.index_put((rows, columns), torch.cat(found))


def _same(found: Tensor, whole: Tensor) -> bool:
    close = 1e-3 * whole.float().abs().max().clamp(min=1)
    return found.shape == whole.shape and bool((found - whole).float().abs().max() <= close)


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-likelihoods from (N, V)."""
    logits = logits.float()
    scores: Tensor = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
    return scores


def _of_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T - 1) from whole logits, row by row."""
    masks = labels[:, 1:] != IGNORED
    found = torch.zeros(masks.shape, dtype=torch.float32, device=logits.device)
    scores = [
        _scores(row[:-1][mask], label[1:][mask])
        for row, label, mask in zip(logits, labels, masks, strict=True)
    ]
    return found.masked_scatter(masks, torch.cat(scores))


def prove_own(loss: float, own: float, dtype: torch.dtype, *, what: str) -> None:
    """Hold a loss against the model's own negative log-likelihood, both in nats a token.

    Raises:
        ProofError: They differ by more than rounding, or one is no number.
    """
    if not abs(loss - own) <= TOLERANCE[dtype] * (1 + abs(own)):
        raise ProofError(
            f"before the first step {what} is {loss:.6f} nats a token, the model's own negative "
            f"log-likelihood of the same targets {own:.6f}: what would be trained is not the model"
        )
