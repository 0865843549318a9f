"""Fixtures that several test files share. Nothing here, and no test, reaches a network."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chat_server import transformers_serve
from commands import Cli, in_process
from families import build_family
from hypothesis import settings
from messages import UPDATE, Table, Told, read_table, write_table
from quick import is_quick, overstays, seconds_of_cores

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from srlm_lite.model.base import LoadedBase

REPOSITORY = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "How do I look after a bicycle? Keep it clean, oil the chain, and check the tyres.",
    "Give me facts about the moon. It is small, it is grey, and it has no air.",
    "Read the reply and judge it. One point for each thing that it does well.",
    "The reply answers the question. It is short and clear. It does not name the topic.",
    "user assistant system reply question Score: 0 Score: 1 Score: 2 Score: 3 Score: 4 Score: 5",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what `make quick` runs: see quick.py")
    parser.addoption(UPDATE, action="store_true", help="write their entries: see messages.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick` the other files are not even imported."""
    left_out = collection_path.name.startswith("test_") and not is_quick(collection_path)
    return True if config.getoption("quick") and left_out else None


LONGEST = (
    "smollm2", "processes", "methods", "loop", "steps", "plan", "tracking", "preflight", "gguf",
    "bench_methods", "compare", "thoughts", "families", "checkpoint", "notebooks", "new_method",
    "layer_names", "report", "rollout_windows", "scpo", "dpo", "losses", "hub", "layering",
)  # fmt: skip
"""Files whose tests take longest, the longest first, without the `test_` before their names."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    longest_first(items)
    if config.getoption("quick"):
        longer = [item for item in items if item.get_closest_marker("model")]
        config.hook.pytest_deselected(items=longer)
        items[:] = [item for item in items if item not in longer]


def longest_first(items: list[pytest.Item]) -> None:
    """Order the tests so that processes which share them end at about the same time.

    xdist deals them in this order, where it is told `--no-loadscope-reorder`.
    """
    order = {f"test_{name}": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold the tests that `make quick` runs to their moment, in every run."""
    before = seconds_of_cores()
    yield
    taken = seconds_of_cores() - before
    if overstays(item, taken):
        pytest.fail(f"took {taken:.0f} s of a core: mark it `model`, or see quick.py")


def pytest_collection_finish() -> None:
    Spared.of_the_collector()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    Spared.of_the_collector()


class Spared:
    """The libraries, hidden from the garbage collector: its rounds would walk through all of them.

    Such a round takes half a second, and each training calls for several. A test may import more.
    """

    modules = 0

    @classmethod
    def of_the_collector(cls) -> None:
        if len(sys.modules) > cls.modules + 100:
            cls.modules = len(sys.modules)
            gc.collect()
            gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an extra that is not installed here, before its fixtures are made."""
    for extra in ("vllm", "unsloth"):
        if item.get_closest_marker(extra) and find_spec(extra) is None:
            pytest.skip(f"{extra} is not installed (extra {extra})")


@pytest.fixture(scope="session")
def messages() -> Table:
    """What users are told."""
    return read_table()


@pytest.fixture
def told(
    request: pytest.FixtureRequest,
    messages: Table,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Told]:
    """Holds what a user is told to the table of messages."""
    file, test = request.path.stem, request.node.name
    update = request.config.getoption(UPDATE)
    expected = None if update else messages.get(file, {}).get(test, [])
    held = Told(expected, tmp_path, tmp_path_factory.getbasetemp())
    yield held
    held.finish()
    if update:
        assert not os.environ.get("PYTEST_XDIST_WORKER"), f"{UPDATE} goes without -n"
        messages.setdefault(file, {})[test] = held.found
        write_table(messages)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command in this process: what `srlm-lite ARGS` prints and ends with."""
    return in_process(monkeypatch, capfd)


@pytest.fixture
def brief_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates by small products and for a moment: they are beside the point."""
    from srlm_lite.bench import roofline

    monkeypatch.setattr(roofline, "LARGE", (256, 256, 256))
    monkeypatch.setattr(roofline, "COPIED", 1 << 22)
    monkeypatch.setattr(roofline, "SECONDS", 0.02)


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 0.2M random weights with a byte-level tokenizer and a ChatML template.

    It writes noise, in milliseconds: for tests of plumbing, not of quality.
    """
    import tokenizers
    import torch
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("tiny_base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def family_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny base, by its name in `families.py`; test processes share it."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):  # whose own folder lies in the one of all
        folder = folder.parent
    return lambda name: build_family(name, folder / "families")


@pytest.fixture(scope="session")
def llama2_tokenizer() -> PreTrainedTokenizerFast:
    """Built the way of Llama-2's: SentencePiece-like pieces, BOS put in front, no chat template."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "[INST] [/INST] INST"], trainer)
    learned = json.loads(backend.to_str())
    vocabulary = learned["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    backend = tokenizers.Tokenizer.from_str(json.dumps(learned))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def wide_headed_base_dir(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 32: vLLM's attention on a CPU knows none of 16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_base_dir)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32})
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide_headed_base")
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(
    tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """The URL of `transformers serve`, and the folder of the base that it serves, which is tiny.

    Its generation config lets the server sample.
    """
    folder = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(tiny_base_dir, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "top_k": 0}))
    with transformers_serve(folder) as url:
        yield url, folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout, or where SRLM_TEST_DATA says; skips where there is none."""
    folder = Path(os.environ.get("SRLM_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set SRLM_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> LoadedBase:
    """SmolLM2-135M from its wheel, loaded once and shared: do not change it."""
    from srlm_lite.model.base import load_base
    from srlm_lite.model.whereabouts import SMOLLM2, SMOLLM2_WHEEL, smollm2_file
    from srlm_lite.settings import Base

    if smollm2_file() is None:
        pytest.skip(f"no SmolLM2 here ({SMOLLM2_WHEEL})")
    return load_base(Base(name=SMOLLM2))
