"""Tiny GGUF files of random weights, and llama.cpp to hold a conversion against."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, HIDDEN, LAYERS = 64, 2, 1, 32, 96, 4
CONTEXT = 4096

TEXT = (
    "It was 1984, and 1234567 clocks were striking 13. He'd gone home; they'll follow!\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # it's WE'RE\r\n\t\tend\n"
    "Caf\u00e9 na\u00efve \u2014 \u4f60\u597d\uff0c\u4e16\u754c\u3002 \u041f\u0440\u0438\u0432"
    "\u0435\u0442   \u00bd \u0661\u0662 x\u00b2 \U0001f642  spaces   and\n\n\n 42 lines\n7\n"
    "CamelCaseWord iPhone15Pro http://example.org/a_b?c=d&e=100% <tag attr='x'> a=b*(c+d)-e/f\n"
)


@functools.cache
def byte_level(size: int = 700) -> tuple[list[str], list[str]]:
    """Pieces and merges of a byte-level BPE that knows some words, numbers and runs of spaces."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    words = [word for word in TEXT.replace("\n", " \n ").split(" ") if word]
    material = [*(f" {word}" for word in words), *words, "  ", "   ", "\n\n", "1234", " 19", "8 4"]
    trained.train_from_iterator(material * 3, trainer)
    said = json.loads(trained.to_str())["model"]
    pieces = sorted(said["vocab"], key=said["vocab"].get)
    return pieces, [" ".join(merge) for merge in said["merges"]]


@functools.cache
def sentencepiece(lines: bool) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types as Llama 2 has them, or with line ends of their own as Gemma."""
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, min_frequency=1)
    spelled = TEXT.replace(" ", "\u2581").replace("\n", "")
    trained.train_from_iterator([spelled[at : at + 24] for at in range(len(spelled))], trainer)
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    letters = sorted(piece for piece in vocabulary if len(piece) == 1)
    merged = [piece for piece in sorted(vocabulary, key=vocabulary.get) if len(piece) > 1]
    rows: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    rows += [("<start>", -1000.0, 3), ("<tool>", -1000.0, 4)]
    rows += [(piece, -1000.0, 4) for piece in ("\n", "\n\n", "  ", "   ") if lines]
    own = {piece.replace(" ", "\u2581") for piece, _, kind in rows if kind == 4}
    learned = [piece for piece in [*merged, *letters] if piece not in own]
    rows += [(piece, -float(rank), 1) for rank, piece in enumerate(learned)]
    pieces, scores, types = map(list, zip(*rows, strict=True))
    return pieces, scores, types


class File:
    """A GGUF file in the making: `keys` and `tensors` may be changed before `write`."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.keys: dict[str, Any] = {
            "context_length": CONTEXT,
            "embedding_length": WIDTH,
            "block_count": LAYERS,
            "feed_forward_length": HIDDEN,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_WIDTH,
            "attention.value_length": HEAD_WIDTH,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": HEAD_WIDTH,
            "rope.freq_base": 10000.0,
        }
        self.tokenizer: dict[str, Any] = {}
        self.general: dict[str, Any] = {}
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}

    def gpt2(self, pre: str | None, **keys: Any) -> File:
        pieces, merges = map(list, byte_level())
        tokens = ["<|end|>", "<|begin|>", *pieces, "<tool>"]
        self.tokenizer = {
            "model": "gpt2",
            **({} if pre is None else {"pre": pre}),
            "tokens": tokens,
            "token_type": [3, 3, *[1] * len(pieces), 4],
            "merges": merges,
            "eos_token_id": 0,
            "bos_token_id": 1,
            **keys,
        }
        return self

    def spm(self, **keys: Any) -> File:
        lines = keys.get("add_space_prefix") is False
        pieces, scores, types = map(list, sentencepiece(lines))
        self.tokenizer = {
            "model": "llama",
            "pre": "default",
            "tokens": pieces,
            "scores": scores,
            "token_type": types,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
            **keys,
        }
        return self

    def weights(self, *, seed: int = 0, scale: float = 0.2) -> File:
        """Random weights of the tensors that the architecture has."""
        random = np.random.default_rng(seed)
        arch, rows = self.architecture, len(self.tokenizer["tokens"])
        q, kv = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (rows, WIDTH), "output_norm": (WIDTH,)}
        if arch == "lfm2":
            shapes["token_embd_norm"] = shapes.pop("output_norm")
        elif arch not in ("gemma2", "gemma3"):
            shapes["output"] = (rows, WIDTH)
        for block in range(LAYERS):
            part: dict[str, tuple[int, ...]] = {
                "attn_norm": (WIDTH,),
                "ffn_norm": (WIDTH,),
                "attn_q": (q, WIDTH),
                "attn_k": (kv, WIDTH),
                "attn_v": (kv, WIDTH),
                "attn_output": (WIDTH, q),
                "ffn_gate": (HIDDEN, WIDTH),
                "ffn_up": (HIDDEN, WIDTH),
                "ffn_down": (WIDTH, HIDDEN),
            }
            if arch in ("gemma2", "gemma3"):
                part |= {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
            if arch in ("gemma3", "qwen3", "qwen3moe"):
                part |= {"attn_q_norm": (HEAD_WIDTH,), "attn_k_norm": (HEAD_WIDTH,)}
            if arch in ("qwen2", "qwen2moe"):
                part |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
            if arch == "lfm2":
                if self.keys["attention.head_count_kv"][block]:
                    part |= {"attn_q_norm": (HEAD_WIDTH,), "attn_k_norm": (HEAD_WIDTH,)}
                else:
                    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                        del part[name]
                    part |= {
                        "shortconv.in_proj": (3 * WIDTH, WIDTH),
                        "shortconv.conv": (WIDTH, self.keys["shortconv.l_cache"]),
                        "shortconv.out_proj": (WIDTH, WIDTH),
                    }
            if arch == "qwen35":
                part["post_attention_norm"] = part.pop("ffn_norm")
                if (block + 1) % self.keys["full_attention_interval"]:
                    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                        del part[name]
                    heads, inner = self.keys["ssm.time_step_rank"], self.keys["ssm.inner_size"]
                    mixed = 2 * self.keys["ssm.state_size"] * self.keys["ssm.group_count"] + inner
                    part |= {
                        "attn_qkv": (mixed, WIDTH),
                        "attn_gate": (inner, WIDTH),
                        "ssm_conv1d": (mixed, self.keys["ssm.conv_kernel"]),
                        "ssm_alpha": (heads, WIDTH),
                        "ssm_beta": (heads, WIDTH),
                        "ssm_dt.bias": (heads,),
                        "ssm_a": (heads,),
                        "ssm_norm": (inner // heads,),
                        "ssm_out": (WIDTH, inner),
                    }
                else:
                    part["attn_q"] = (2 * q, WIDTH)
                    part |= {"attn_q_norm": (HEAD_WIDTH,), "attn_k_norm": (HEAD_WIDTH,)}
            if arch == "phi3":
                for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
                    del part[name]
                part |= {"attn_qkv": (q + 2 * kv, WIDTH), "ffn_up": (2 * HIDDEN, WIDTH)}
            if arch.endswith("moe"):
                for name in ("ffn_gate", "ffn_up", "ffn_down"):
                    shape = part.pop(name)
                    part[f"{name}_exps"] = (self.keys["expert_count"], *shape)
                part["ffn_gate_inp"] = (self.keys["expert_count"], WIDTH)
            if arch == "qwen2moe":
                part |= {
                    "ffn_gate_shexp": (HIDDEN, WIDTH),
                    "ffn_up_shexp": (HIDDEN, WIDTH),
                    "ffn_down_shexp": (WIDTH, HIDDEN),
                    "ffn_gate_inp_shexp": (WIDTH,),
                }
            shapes |= {f"blk.{block}.{name}": shape for name, shape in part.items()}
        for name, shape in shapes.items():
            full = name if name.endswith((".bias", "ssm_a")) else f"{name}.weight"
            values = random.normal(0, scale, shape)
            if name.endswith("norm"):
                values = 1 + 0.1 * values
            if name.endswith("ssm_a"):
                values = -np.exp(values)
            # In bfloat16 already, so that a conversion rounds nothing off.
            bits = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
            self.tensors[full] = bits.astype(np.uint32).view(np.float32)
        return self

    def set(self, **keys: Any) -> File:
        """Keys of the architecture, `__` for a dot."""
        self.keys |= {name.replace("__", "."): value for name, value in keys.items()}
        return self

    def divided(self, factor: float, *, context: int, low: float, high: float) -> File:
        """Frequencies divided as Llama 3.1 has it: by 1 for short waves, by `factor` for long."""
        lengths = (
            2 * np.pi * self.keys["rope.freq_base"] ** (np.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
        )
        share = np.clip((context / lengths - low) / (high - low), 0, 1)
        divisors = 1 / ((1 - share) / factor + share)
        self.tensors["rope_freqs.weight"] = divisors.astype(np.float32)
        return self

    def write(self, file: Path) -> Path:
        writer = gguf.GGUFWriter(file, self.architecture)
        named = {f"{self.architecture}.{name}": value for name, value in self.keys.items()}
        named |= self.general
        named |= {f"tokenizer.ggml.{name}": value for name, value in self.tokenizer.items()}
        for key, value in named.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for name, values in self.tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file


class LlamaCpp:
    """A server of llama.cpp on this machine that holds one file."""

    def __init__(self, address: str) -> None:
        self._address = address

    def post(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(
            self._address + path, json.dumps(body).encode(), headers=headers
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str, *, bos: bool = False) -> list[int]:
        said = self.post("/tokenize", content=text, add_special=bos, parse_special=True)
        ids: list[int] = said["tokens"]
        return ids

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> np.ndarray[Any, Any]:
        """The log-probability of every token after these."""
        said = self.post(
            "/completion",
            prompt=list(ids),
            n_predict=1,
            n_probs=vocabulary,
            temperature=-1.0,
            # No probabilities come with a token that ends, or is part of a letter.
            logit_bias=[[self.ids("a")[-1], 1000.0]],
            cache_prompt=False,
        )
        values = np.full(vocabulary, np.nan)
        for row in said["completion_probabilities"][0]["top_logprobs"]:
            values[row["id"]] = row["logprob"]
        return values


SERVER = """
import sys, xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx = settings.n_batch = settings.n_ubatch = 2048
settings.n_parallel = 1
settings.warmup = False
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.port = 0
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
print("address:", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def llama_cpp(file: Path) -> Iterator[LlamaCpp]:
    """llama.cpp's server, in a process of its own that is killed: one in this process has been seen
    (xllamacpp 2026.10.11549) to wait for ever for its own end."""
    command = [sys.executable, "-c", SERVER, str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = (line for line in process.stdout if line.startswith("address: "))
            yield LlamaCpp(next(said).split()[1])
        finally:
            process.kill()
