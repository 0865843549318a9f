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
from srlm_lite.training.trees import Text

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""By which a loss may miss the model's own likelihood: so many nats a token, and that share of
them. A row holds many texts and the comparison one, so 16 bits round differently in the two."""

Scored = tuple[Tensor, Tensor, Tensor]
"""Rows and columns of tokens in a batch, and the ids that come next."""
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
        """Within this context a forward pass that is given `scored`, rows, columns and ids, each
        (N,), has as its `logits`, (N,), the log-likelihood of each id after the token at that place
        of the batch.

        Without it, it is what it was.
        """
        causal, original = self._causal, self._causal.forward
        own = vars(causal).get("forward")

        def forward(*args: Any, scored: Scored | None = None, **kwargs: Any) -> Any:
            if scored is None:
                return original(*args, **kwargs)
            if self._path is None:
                rows, columns, targets = scored
                logits = original(*args, **kwargs).logits
                return outputs.CausalLMOutput(logits=_scores(logits[rows, columns], targets))
            return outputs.CausalLMOutput(logits=self._by_pieces(self._path, scored, kwargs))

        causal.forward = forward
        try:
            yield
        finally:
            del causal.forward
            if own is not None:
                causal.forward = own

    @torch.no_grad()
    def own(self, model: Any, text: Text) -> float:
        """The log-likelihood of a text's target after its prompt, summed, by a plain forward pass.

        The text is by itself, and the model, wrapped or not, is called as it is for sampling. Where
        it can be asked for the logits of some positions, no more than `PIECE` are there at once.
        """
        prompt, target = text
        device = next(self._causal.parameters()).device
        ids = torch.tensor([[*prompt, *target]], device=device)
        columns = torch.arange(len(prompt), ids.shape[1], device=device) - 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        total = 0.0
        if self._takes_positions:
            for piece in torch.split(columns, PIECE):
                logits = model(**inputs, logits_to_keep=piece).logits[0]
                total += float(_scores(logits, ids[0, piece + 1]).sum())
        else:
            whole = model(**inputs).logits[0]
            for piece in torch.split(columns, PIECE):
                total += float(_scores(whole[piece], ids[0, piece + 1]).sum())
        return total

    def _by_pieces(self, path: str, scored: Scored, inputs: dict[str, Any]) -> Tensor:
        rows, columns, targets = scored
        output = self._output(path, inputs)
        kind, states = type(output), output.last_hidden_state[rows, columns]

        def score(states: Tensor, piece: slice) -> Tensor:
            with self._picking(rows[piece], columns[piece]):
                return _scores(self._logits(path, kind, states, targets[piece]), targets[piece])

        pieces = [slice(at, at + PIECE) for at in range(0, max(1, len(targets)), PIECE)]
        if not states.requires_grad:
            return torch.cat([score(states[piece], piece) for piece in pieces])
        if not self._head_learns(path):
            found: Tensor = _Scored.apply(states, score, pieces)  # type: ignore[no-untyped-call]
            return found
        # One piece's logits may stay; those of more are computed again in the backward pass.
        several = len(pieces) > 1
        return torch.cat(
            [
                checkpoint(
                    score, states[piece], piece, use_reentrant=False, preserve_rng_state=False
                )
                if several
                else score(states[piece], piece)
                for piece in pieces
            ]
        )

    def _head_learns(self, path: str) -> bool:
        """Whether anything outside of the backbone learns."""
        named = self._causal.named_parameters()
        return any(one.requires_grad for name, one in named if not name.startswith(f"{path}."))


class _Scored(torch.autograd.Function):
    """Log-likelihoods from hidden states by a head that does not learn itself.

    A token's is a function of its own state alone, so its slope is known before the loss is; with
    it a piece's logits are computed once, and are gone before the next piece's.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, score: Callable[[Tensor, slice], Tensor], pieces: Sequence[slice]
    ) -> Tensor:
        found, slopes = [], torch.empty_like(states)
        for piece in pieces:
            with torch.enable_grad():
                given = states[piece].detach().requires_grad_()
                scores = score(given, piece)
                (slopes[piece],) = torch.autograd.grad(scores.sum(), given)
            found.append(scores.detach())
        ctx.save_for_backward(slopes)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0].unsqueeze(1) * slopes).to(slopes.dtype), None, None


def _same(found: Tensor, whole: Tensor) -> bool:
    close = 1e-3 * whole.float().abs().max().clamp(min=1)
    return found.shape == whole.shape and bool((found - whole).float().abs().max() <= close)


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) log-likelihoods from (N, V)."""
    found: Tensor = _Chances.apply(logits, targets)  # type: ignore[no-untyped-call]
    return found


class _Chances(torch.autograd.Function):
    """log softmax at the targets. With p the chances, dx = (target - p) g: one table in float32
    is all that there is beside the logits, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chances = torch.log_softmax(logits, dim=1, dtype=torch.float32)
        ctx.save_for_backward(chances, targets)
        ctx.dtype = logits.dtype
        return chances.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chances, targets = ctx.saved_tensors
        slopes = chances.exp_().mul_(-gradients[0].float()[:, None])
        slopes.scatter_add_(1, targets[:, None], gradients[0].float()[:, None])
        return slopes.to(ctx.dtype), None


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
