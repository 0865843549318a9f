"""The tokenizer of a GGUF file, built from what the file says, and held against it.

llama.cpp is the reference for what the keys mean. Of its kinds of vocabulary two are served:
byte-level BPE (`gpt2`), and SentencePiece's BPE (`llama`), whose scores say which pair is merged
first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from srlm_lite.model.gguf_header import Header
from srlm_lite.model.gguf_splits import SPLITS

hf: Any = transformers  # only partly typed

SENTENCEPIECE_FILE, ADDED_FILE = "tokenizer.model", "added_tokens.json"
"""Without them llama.cpp's converter gives every piece of such a vocabulary the same score, and
takes tokens that are found before all others, such as Gemma's runs of spaces, for plain ones."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of a token, in GGUF as in SentencePiece."""
_SPACE = "\u2581"
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",  # sic
    "cls": "cls",
    "mask": "mask",
}
_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids that a SentencePiece vocabulary has where the file is silent."""
_ENDS = ("eos", "eot", "eom")
_READ = {
    *("model", "pre", "tokens", "token_type", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
    *(f"{name}_token_id" for name in (*_ROLES.values(), "eot", "eom")),
}
_WITHOUT_EFFECT = {
    *("token_type_count", "add_sep_token", "suppress_tokens"),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"{name}_token_id" for name in ("prefix", "suffix", "middle", "fsep")),
}
"""Keys of a vocabulary of these two kinds that say which token is for what, not how text is cut."""
_PHI3_KEEPS_SPACE = {"<unk>", "<s>", "<|endoftext|>"}

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces, then 3.14159, 1234567890 and 007!\n\n\n\tA tab, a line   \n",
    "if (x == 10) {\r\n        return foo[i]->bar; // it's, WE'RE, I'll\r\n}",
    "H\u00e9llo w\u00f6rld \u2014 na\u00efve caf\u00e9; \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u0645\u0631\u062d\u0628\u0627 \U0001f642\u200d "
    "\ud55c\uad6d\uc5b4 \u0939\u093f\u0928\u094d\u0926\u0940",
    "".join(f"{'a' * n} {'-' * n}{' ' * n}{chr(10) * n}{'1' * n}" for n in range(1, 18)),
)
"""Texts that a tokenizer is tried on: words, spaces, digits, code, scripts, runs."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The part of a file that concerns text."""

    header: Header
    pieces: list[str]
    types: list[int]

    @property
    def sentencepiece(self) -> bool:
        return bool(self.key("model") == "llama")

    def key(self, name: str, default: Any = None) -> Any:
        return self.header.fields.get(f"tokenizer.ggml.{name}", default)

    def special_id(self, name: str) -> int | None:
        """The id of a role's token, by the word that GGUF has for the role."""
        default = _DEFAULTS.get(name) if self.sentencepiece else None
        found: int | None = self.key(f"{name}_token_id", default)
        return found if found is not None and 0 <= found < len(self.pieces) else None

    @property
    def ends(self) -> list[int]:
        """Every id that the file says a text or a turn ends with."""
        ids = {self.special_id(name) for name in _ENDS}
        return sorted(one for one in ids if one is not None)

    def adds(self, name: str) -> bool:
        """Whether the tokenizer itself puts BOS or EOS around a text."""
        default = name == "bos" and (self.sentencepiece or SPLITS[self.split].bos)
        return bool(self.key(f"add_{name}_token", default)) and self.special_id(name) is not None

    @property
    def prefixed(self) -> bool:
        """Whether a text is read as if a space stood in front of it."""
        return bool(self.sentencepiece and self.key("add_space_prefix", True))

    @property
    def split(self) -> str:
        return str(self.key("pre", "default"))

    def of_type(self, *types: int) -> Iterator[int]:
        return (token for token, kind in enumerate(self.types) if kind in types)


def read_vocabulary(header: Header) -> Vocabulary:
    """What the file says of its tokens.

    Raises:
        UserError: It is of a kind that is not served, or contradicts itself.
    """
    fields = header.fields
    unknown = sorted(
        key
        for key in fields
        if key.startswith("tokenizer.ggml.")
        and key.removeprefix("tokenizer.ggml.") not in _READ | _WITHOUT_EFFECT
        and fields[key]
    )
    if unknown:
        raise header.refusal(f"nothing is known of its key {unknown[0]}")
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise header.refusal(
            f"its vocabulary is of the kind {kind}, and only gpt2 and llama are served"
        )
    pieces = fields.get("tokenizer.ggml.tokens")
    if not isinstance(pieces, list) or not pieces:
        raise header.refusal("it has no tokenizer.ggml.tokens")
    pieces = [piece or f"[EMPTY_{token}]" for token, piece in enumerate(pieces)]
    types = fields.get("tokenizer.ggml.token_type", [_NORMAL] * len(pieces))
    if len(types) != len(pieces):
        raise header.refusal(f"it has {len(pieces)} tokens and {len(types)} types of them")
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise header.refusal(f"two of its tokens are {twice!r}")
    vocabulary = Vocabulary(header, pieces, types)
    if not vocabulary.sentencepiece and vocabulary.split not in SPLITS:
        raise header.refusal(
            f"tokenizer.ggml.pre is {vocabulary.split}, and how that splits text is not known here"
        )
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary) -> Any:
    """The tokenizer that the file describes.

    Raises:
        UserError: Its merges or scores cannot be followed.
    """
    backend = _sentencepiece(vocabulary) if vocabulary.sentencepiece else _byte_level(vocabulary)
    _add_tokens(vocabulary, backend)
    roles = {f"{role}_token": vocabulary.special_id(name) for role, name in _ROLES.items()}
    template = vocabulary.header.fields.get("tokenizer.chat_template")
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=vocabulary.adds("bos"),
        add_eos_token=vocabulary.adds("eos"),
        clean_up_tokenization_spaces=False,
        **{
            role: None if token is None else vocabulary.pieces[token]
            for role, token in roles.items()
        },
        **({"chat_template": template} if template else {}),
    )


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    merges = vocabulary.key("merges")
    if not isinstance(merges, list):
        raise vocabulary.header.refusal("it has no tokenizer.ggml.merges")
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    pairs = []
    for merge in merges:
        left, _, right = merge[1:].partition(" ")  # the first character may be a space
        pair = (merge[:1] + left, right)
        if not right or any(piece not in ids for piece in (*pair, "".join(pair))):
            raise vocabulary.header.refusal(f"its merge {merge!r} is not one of its tokens")
        pairs.append(pair)
    split = SPLITS[vocabulary.split]
    backend = Tokenizer(models.BPE(ids, pairs, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that are a piece together, the best score merges.

    As a list of merges: every way to cut a piece in two, the pieces in order of their scores.
    """
    scores = vocabulary.key("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.pieces):
        raise vocabulary.header.refusal("it has no score for each of its tokens")
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    found: list[tuple[float, list[tuple[str, str]]]] = []
    for token in vocabulary.of_type(_NORMAL):
        piece = vocabulary.pieces[token]
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        if pairs:
            found.append((scores[token], pairs))
    if len({score for score, _ in found}) < len(found):
        raise vocabulary.header.refusal("tokens of the same score: which is merged first is open")
    found.sort(key=lambda one: -one[0])
    unknown = vocabulary.special_id("unknown")
    backend = Tokenizer(
        models.BPE(
            ids,
            [pair for _, pairs in found for pair in pairs],
            unk_token=None if unknown is None else vocabulary.pieces[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_tokens(vocabulary: Vocabulary, backend: Tokenizer) -> None:
    """Tokens that are found in a text before anything else is."""
    name = str(vocabulary.header.fields.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name  # whose file cannot say that they swallow spaces

    def added(token: int, special: bool) -> AddedToken:
        piece = vocabulary.pieces[token]
        rstrip = phi3 and piece not in _PHI3_KEEPS_SPACE
        return AddedToken(piece, special=special, normalized=False, rstrip=rstrip)

    backend.add_special_tokens(
        [added(token, True) for token in vocabulary.of_type(_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens([added(token, False) for token in vocabulary.of_type(_USER_DEFINED)])


def write_sentencepiece(vocabulary: Vocabulary, folder: Path) -> None:
    """The files that llama.cpp's converter reads such a vocabulary from."""
    (folder / SENTENCEPIECE_FILE).write_bytes(sentencepiece_model(vocabulary))
    if added := {vocabulary.pieces[token]: token for token in vocabulary.of_type(_USER_DEFINED)}:
        text = json.dumps(added, ensure_ascii=False, indent=0)
        (folder / ADDED_FILE).write_text(text + "\n", encoding="utf-8")


def sentencepiece_model(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a model of SentencePiece, in its protocol buffer.

    Numbers of the fields: src/sentencepiece_model.proto of
    https://github.com/google/sentencepiece.
    """
    scores, unknown = vocabulary.key("scores"), vocabulary.special_id("unknown")
    model = []
    for token, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True)):
        if kind == _USER_DEFINED:
            piece = piece.replace(" ", _SPACE)
        if kind == _UNKNOWN or token == unknown:
            kind = _UNKNOWN if token == unknown else _CONTROL
        fields = _field(1, piece.encode()) + _field(2, scores[token]) + _field(3, kind)
        model.append(_field(1, fields))
    bpe, fallback = 2, len(list(vocabulary.of_type(_BYTE))) == 256
    trainer = _field(3, bpe) + _field(4, len(vocabulary.pieces)) + _field(35, int(fallback))
    for number, role in enumerate(("unknown", "bos", "eos", "padding")):
        token_id = vocabulary.special_id(role)
        trainer += _field(40 + number, -1 if token_id is None else token_id)
        if token_id is not None:
            trainer += _field(45 + number, vocabulary.pieces[token_id].encode())
    normalizer = _field(1, b"identity") + _field(3, int(vocabulary.prefixed))
    normalizer += _field(4, 0) + _field(5, 1)  # keep spaces as they are, but spell them
    return b"".join([*model, _field(2, trainer), _field(3, normalizer)])


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer: varint, float, or bytes."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value % (1 << 64))
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def check_tokenizer(vocabulary: Vocabulary, built: Any, folder: Path) -> None:
    """Hold the tokenizer of a folder, as transformers opens it, against the file's tokens, and
    against what was built from them.

    Raises:
        UserError: Another number of tokens, another id, a token that decodes to anything but its
            text, a text that does not come back, or other ids than SentencePiece has for it.
    """
    tokenizer = hf.AutoTokenizer.from_pretrained(str(folder))
    pieces, refusal = vocabulary.pieces, vocabulary.header.refusal
    if len(tokenizer) != len(pieces):
        raise refusal(f"of its {len(pieces)} tokens, transformers makes {len(tokenizer)}")
    spelled = tokenizer.convert_ids_to_tokens(range(len(pieces)))
    said = tokenizer.backend_tokenizer.decode_batch(
        [[token] for token in range(len(pieces))], skip_special_tokens=False
    )
    for token, piece in enumerate(pieces):
        wanted = _text(vocabulary, token)
        if spelled[token] != piece or said[token] != wanted:
            raise refusal(
                f"its token {token}, {piece!r}, would be {spelled[token]!r} and say {said[token]!r}"
            )
    for role, name in _ROLES.items():
        if (wanted_id := vocabulary.special_id(name)) is not None:
            found = getattr(tokenizer, f"{role}_token_id")
            if found != wanted_id:
                raise refusal(f"its {name} token is {wanted_id}, and would be {found}")
    reference = None
    if vocabulary.sentencepiece:
        reference = sentencepiece.SentencePieceProcessor()
        try:
            reference.LoadFromSerializedProto((folder / SENTENCEPIECE_FILE).read_bytes())
        except RuntimeError as error:
            raise refusal(f"SentencePiece does not take its vocabulary ({error})") from error
    for text in SAMPLES:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back != text:
            raise refusal(f"{text[:40]!r} would come back as {back[:40]!r}")
        if tokenizer(text).input_ids != built(text).input_ids:
            raise refusal(
                f"transformers opens {type(tokenizer).__name__} for its architecture, which cuts "
                f"text otherwise than {vocabulary.split}"
            )
        if reference is not None and ids != reference.EncodeAsIds(text):
            raise refusal(f"{text[:40]!r} would get other ids than SentencePiece gives it")


def _text(vocabulary: Vocabulary, token: int) -> str:
    """What a token says, by its type and spelling."""
    piece, kind = vocabulary.pieces[token], vocabulary.types[token]
    if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
        text = piece
    elif not vocabulary.sentencepiece:
        known = all(character in _BYTES for character in piece)
        spelled = bytes(_BYTES[character] for character in piece) if known else piece.encode()
        text = spelled.decode(errors="replace")
    elif kind == _BYTE:
        text = bytes([int(piece[3:5], 16)]).decode(errors="replace")
    else:
        text = piece.replace(_SPACE, " ")
    return text.removeprefix(" ") if vocabulary.prefixed else text


def _byte_table() -> dict[str, int]:
    """GPT-2's letters for bytes: itself where a byte can be seen, else the next one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + n): byte for n, byte in enumerate(hidden)
    }


_BYTES = _byte_table()
