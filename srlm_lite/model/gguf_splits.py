"""How byte-level vocabularies split a text into words before they merge.

A GGUF file names the way in `tokenizer.ggml.pre`. The patterns are those of the models' own
tokenizer.json where llama.cpp (src/llama-vocab.cpp, July 2026) quotes them, else llama.cpp's: each
cuts what the one before it has left, matches and gaps alike becoming pieces.
"""

from __future__ import annotations

from typing import NamedTuple


class Split(NamedTuple):
    """What a value of `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    bos: bool = False
    """Whether a text begins with BOS where the file does not say."""
    nfc: bool = False


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt4(digits: str, *, letters: str = r"\p{L}", marks: str = "", extra: str = r"[\r\n]*") -> str:
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+{extra}|{_TAIL}"
    )


def _cased(digits: str, *, endings: bool) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    end = f"(?i:{_CONTRACTIONS})?" if endings else ""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


_LLAMA3 = _gpt4(r"\p{N}{1,3}")
_QWEN2 = _gpt4(r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-"
    "\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-"
    "\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00"
    "-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
    "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
    "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13"
    "-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
"""Letters of scripts with two cases, as DeepSeek LLM's tokenizer.json lists them."""
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_SPLITS: dict[str, Split] = {
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Split(
        (_LLAMA3,), ignore_merges=True, bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Split((_LLAMA3,)),
    "glm4 glm5": Split((_LLAMA3,), ignore_merges=True),
    "qwen2": Split((_QWEN2,), nfc=True),
    "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Split((_QWEN2,)),
    "qwen35": Split((_gpt4(r"\p{N}", letters=r"[\p{L}\p{M}]", marks=r"\p{M}"),), nfc=True),
    "seed-coder": Split(
        (
            rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",
        )
    ),
    "bailingmoe bailingmoe2 llada-moe": Split(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4": Split(
        (_GPT2,)
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Split(
        (r"\p{N}", _GPT2)
    ),
    "falcon": Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom gpt3-finnish poro-chat": Split((_BLOOM,)),
    "viking": Split((_BLOOM, r"\p{N}")),
    "tekken": Split((_cased(r"\p{N}", endings=False),), ignore_merges=True, bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": Split((_cased(r"\p{N}{1,3}", endings=True),)),
    "deepseek-llm": Split(
        (
            "[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _HAN_AND_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm": Split(_DEEPSEEK3),
}

SPLITS = {name: split for names, split in _SPLITS.items() for name in names.split()}
