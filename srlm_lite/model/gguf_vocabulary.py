"""The part of a GGUF file that concerns text, from a tokenizer: the way back of `gguf_tokenizer`.

Written is only what reading it gives the tokenizer's own ids for. Two kinds of vocabulary are
known: byte-level BPE (`gpt2`), whose way of cutting has a name in `tokenizer.ggml.pre`, and
SentencePiece's BPE (`llama`), whose scores say which pair is merged first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from srlm_lite.errors import UserError
from srlm_lite.model.gguf_header import Header
from srlm_lite.model.gguf_splits import SPLITS, Split
from srlm_lite.model.gguf_tokenizer import SAMPLES, build_tokenizer, read_vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1000.0
"""Score of a piece that nothing is merged into; llama.cpp's own converter has the same."""
_BYTE_LEVEL_CUTS = SPLITS["gpt-2"].patterns[0]
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def vocabulary_keys(
    tokenizer: Any, *, rows: int, ends: Sequence[int], last: int, template: str
) -> dict[str, Any]:
    """The keys of a GGUF file for a tokenizer, whole as they stand in it.

    Args:
        rows: Of the embeddings: a token for each.
        ends: Every id at which a reply ends. A file has places for three of them.
        last: The one of them that ends a turn.
        template: The chat template.

    Raises:
        UserError: No GGUF file can say how this tokenizer cuts text, or none that is known here.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {one["id"]: one for one in state["added_tokens"]}
    pieces = _pieces(tokenizer, rows)
    for one in added.values():
        if one["lstrip"] or one["rstrip"] or one["single_word"]:
            raise _refusal(f"its token {one['content']!r} takes the space around it as its own")
    if state["model"]["type"] != "BPE":
        raise _refusal(f"it is of the kind {state['model']['type']}, and not BPE")
    types = [_type_of(piece, added.get(token)) for token, piece in enumerate(pieces)]
    kind = _byte_level(state) if _spells_bytes(state) else _sentencepiece(state, pieces, types)
    if "scores" not in kind:
        types = [_NORMAL if one == _BYTE else one for one in types]
    roles = {
        f"{name}_token_id": getattr(tokenizer, f"{role}_token_id") for role, name in _ROLES.items()
    }
    if "scores" in kind and roles["unknown_token_id"] is not None:
        types[roles["unknown_token_id"]] = _UNKNOWN
    named = {
        **kind,
        "tokens": pieces,
        "token_type": types,
        **{name: token for name, token in roles.items() if token is not None},
        **_ends(roles["eos_token_id"], ends, last),
        **_adds(tokenizer),
    }
    keys = {f"tokenizer.ggml.{name}": value for name, value in named.items()}
    return {**keys, "tokenizer.chat_template": template}


def check_vocabulary(
    keys: dict[str, Any], architecture: str, tokenizer: Any, texts: Iterable[str]
) -> None:
    """Hold the tokenizer that is read from these keys against the one they are from.

    Raises:
        UserError: A text gets other ids, or a token is another.
    """
    header = Header(Path("the export"), {"general.architecture": architecture, **keys}, {}, set())
    built = build_tokenizer(read_vocabulary(header))
    for text in (*SAMPLES, *texts):
        for bare in (False, True):
            ours = tokenizer(text, add_special_tokens=not bare).input_ids
            if built(text, add_special_tokens=not bare).input_ids != ours:
                raise _refusal(f"read back from the file, it cuts {text[:40]!r} otherwise")


def _pieces(tokenizer: Any, rows: int) -> list[str]:
    """Every token by its id; a row that no token has gets a name of its own."""
    known = {token: piece for piece, token in tokenizer.get_vocab().items()}
    if known and max(known) >= rows:
        raise _refusal(f"it has a token {max(known)}, and the embeddings have {rows} rows")
    return [known.get(token, f"[PAD{token}]") for token in range(rows)]


def _type_of(piece: str, added: dict[str, Any] | None) -> int:
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    if _BYTE_PIECE.fullmatch(piece):
        return _BYTE
    return _UNUSED if re.fullmatch(r"\[PAD\d+\]", piece) else _NORMAL


def _ends(eos: int | None, ends: Sequence[int], last: int) -> dict[str, int]:
    """Ids that end a reply, in the places that a file has for them."""
    first = eos if eos in ends and eos is not None else last
    others = [token for token in (last, *ends) if token != first]
    places = zip(("eot", "eom"), dict.fromkeys(others), strict=False)
    return {
        "eos_token_id": first,
        **{f"{name}_token_id": token for name, token in places},
    }


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer itself puts BOS before a text, and EOS behind it."""
    ids = tokenizer("x").input_ids
    bare = tokenizer("x", add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = bos is not None and ids[:1] == [bos] and bare[:1] != [bos]
    after = eos is not None and ids[-1:] == [eos] and bare[-1:] != [eos]
    return {"add_bos_token": before, "add_eos_token": after}


def _parts(state: dict[str, Any], name: str, of: str) -> list[dict[str, Any]]:
    """A step of a tokenizer as the list of its parts."""
    step = state[name]
    if step is None:
        return []
    return [part for one in step[of] for part in ([one] if one else [])] if of in step else [step]


def _spells_bytes(state: dict[str, Any]) -> bool:
    steps = _parts(state, "pre_tokenizer", "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def _byte_level(state: dict[str, Any]) -> dict[str, Any]:
    cuts: list[str] = []
    for step in _parts(state, "pre_tokenizer", "pretokenizers"):
        cuts += _cuts(step)
    steps = _parts(state, "normalizer", "normalizers")
    if any(step["type"] != "NFC" for step in steps):
        raise _refusal(f"it rewrites text first ({steps[0]['type']}), which no key of GGUF says")
    model = state["model"]
    wanted = (tuple(cuts), bool(model.get("ignore_merges")), bool(steps))
    found = next((name for name, split in SPLITS.items() if _told(split) == wanted), None)
    if found is None:
        raise _refusal("how it cuts text into words has no name in tokenizer.ggml.pre known here")
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {"model": "gpt2", "pre": found, "merges": merges}


def _told(split: Split) -> tuple[tuple[str, ...], bool, bool]:
    return split.patterns, split.ignore_merges, split.nfc


def _cuts(step: dict[str, Any]) -> list[str]:
    """The patterns by which one step cuts text."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return [_BYTE_LEVEL_CUTS] if step["use_regex"] else []
    if step["type"] == "Digits":
        return [r"\p{N}" if step["individual_digits"] else r"\p{N}+"]
    keeps = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    if step["type"] == "Split" and keeps:
        said = step["pattern"]
        return [said["Regex"] if "Regex" in said else re.escape(said["String"])]
    raise _refusal(f"it cuts text by {step['type']}, in a way that no key of GGUF says")


def _sentencepiece(state: dict[str, Any], pieces: list[str], types: list[int]) -> dict[str, Any]:
    prefix = spaces = False
    for step in _parts(state, "normalizer", "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "}:
            spaces = step["content"] == _SPACE
        else:
            raise _refusal(f"it rewrites text by {step['type']}, which no key of GGUF says")
    for step in _parts(state, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == _SPACE and not step["split"]:
            prefix, spaces = step["prepend_scheme"] != "never", True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and spaces):
            raise _refusal(f"it cuts text by {step['type']}, in a way that no key of GGUF says")
    if not spaces or not state["model"].get("byte_fallback"):
        raise _refusal("it is neither byte-level nor one of SentencePiece's")
    return {
        "model": "llama",
        "pre": "default",
        "scores": _scores(state["model"]["merges"], pieces, types),
        "add_space_prefix": prefix,
    }


def _scores(merges: Sequence[Any], pieces: list[str], types: list[int]) -> list[float]:
    """Scores by which SentencePiece merges what the merges say, in their order.

    Raises:
        UserError: There are none: it merges any two neighbours that are a piece together.
    """
    ids = {piece: token for token, piece in enumerate(pieces)}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.setdefault(left + right, set()).add((left, right))
    for piece, token in ids.items():
        cuts = {(piece[:at], piece[at:]) for at in range(1, len(piece))}
        possible = {cut for cut in cuts if cut[0] in ids and cut[1] in ids}
        if types[token] == _NORMAL and pairs.get(piece, set()) != possible:
            raise _refusal(
                f"its merges do not put {piece!r} together in every way that its pieces allow, and "
                "SentencePiece's do"
            )
    scores = [0.0 if kind in (_CONTROL, _BYTE, _UNKNOWN) else _NEVER for kind in types]
    for rank, piece in enumerate(pairs):
        scores[ids[piece]] = -float(rank)
    rest = [token for token, kind in enumerate(types) if kind == _NORMAL]
    rest = [token for token in rest if pieces[token] not in pairs]
    for rank, token in enumerate(rest, start=len(pairs)):
        scores[token] = -float(rank)
    return scores


def _refusal(what: str) -> UserError:
    return UserError(
        f"the base's tokenizer cannot be put into a GGUF file here: {what}",
        where="--as gguf",
        way_out="llama.cpp's own converter may know it: name its directory in SRLM_LITE_LLAMA_CPP",
    )
