"""Export as one GGUF file, which llama.cpp, Ollama and LM Studio run.

Written by llama.cpp's own converter and quantizer where they are installed, else by the package
`gguf`, for the families that it is proven for. Either way the file is read back by other code, each
tensor is held against the rounded sum, and its logits against the stack's; where llama.cpp's Python
package is installed, llama.cpp answers from it too.
"""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from srlm_lite.errors import ProofError, UserError
from srlm_lite.export import llama_cpp
from srlm_lite.export.card import write_card
from srlm_lite.export.export import STATE, Export, ExportWish, broken, megabytes
from srlm_lite.export.modelfile import go_template, modelfile
from srlm_lite.export.source import FinishedModel
from srlm_lite.hardware import machine_memory
from srlm_lite.progress import Reporter
from srlm_lite.run.files import read_json, write_json

if TYPE_CHECKING:
    from srlm_lite.model.gguf_read import GgufModel
    from srlm_lite.model.gguf_write import GgufFile
    from srlm_lite.model.merge import MergePlan

MODELFILE = "Modelfile"

_HALFWAY = "f16"
"""What llama-quantize gets: it rounds to few bits from there."""
_LOGITS = {"f16": 0.0125, "bf16": 0.1, "q8_0": 0.5, "q4_k_m": 1.0}
"""How far rounding may move any logit, as a share of the largest one. For types of few bits that
says little; their tensors are held to the rounding itself."""
_DIVERGENCE = 0.1
"""Nats between llama.cpp and the file as it is read here. llama.cpp rounds what meets quantized
weights to 8 bits, which took up to .02; a wrong tensor or frequency takes whole nats."""
_CONTEXTS = 4
_SAID = "What is the moon made of?"


class GgufExport(Export):
    """An export as GGUF at work.

    Raises:
        UserError: On construction, beside what every export raises: nothing here can write this
            type, or this base, or check the file.
    """

    def __init__(self, source: FinishedModel, wish: ExportWish, reporter: Reporter) -> None:
        super().__init__(source, wish, reporter)
        if wish.dtype != "auto":
            raise UserError(
                "says nothing of a GGUF file",
                where=f"--dtype {wish.dtype}",
                way_out="Say --quantize f16, bf16, q8_0 or q4_k_m",
            )
        self._converter = llama_cpp.found(llama_cpp.CONVERTER)
        self._quantizer = llama_cpp.found(llama_cpp.QUANTIZER)
        self.fell_back = ""
        """What llama.cpp's converter said, where the package `gguf` wrote the file in its place."""
        if self.quantize == "q4_k_m" and self._quantizer is None:
            raise UserError(
                "the package gguf cannot round to K types, and llama-quantize is not here",
                where="--quantize q4_k_m",
                way_out=f"Put llama.cpp's llama-quantize on PATH, or name its directory in "
                f"{llama_cpp.SETTING}; or say --quantize q8_0",
            )
        if self._converter is None:
            _ = self.file  # refuses what it cannot write, before anything is

    @cached_property
    def quantize(self) -> str:
        """As wished; else the 16 bits that the base has."""
        if self.wish.quantize is not None:
            return self.wish.quantize
        return "f16" if str(self.layout.checkpoint.main_dtype) == "torch.float16" else "bf16"

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self._title}-{self.quantize}.gguf"

    @property
    def _title(self) -> str:
        return re.sub(r"[^\w.-]+", "-", self.source.name)

    @property
    def precision(self) -> str:
        """What the base's weights are before the adapters are added: a dtype, or a type of GGUF."""
        if self.files.kind == "gguf":
            from srlm_lite.model.gguf_read import main_type

            return main_type(Path(self.files.source["location"]))
        if self.onto == "dequantized":
            return "NF4"
        return str(self.layout.checkpoint.main_dtype).removeprefix("torch.")

    @property
    def rounding(self) -> str:
        """From which precision the file's comes, in words."""
        once = f"by way of {_HALFWAY}" if self.quantize == "q4_k_m" else "rounded once"
        return f"from {self.precision} to {self.quantize}, {once}"

    @cached_property
    def plan(self) -> MergePlan:
        """What is merged, in float32: rounded once, to the file's type."""
        from srlm_lite.model.checkpoint import NAMED
        from srlm_lite.model.merge import plan

        return plan(self.layout, self.stack, dtype=NAMED["float32"])

    @property
    def nbytes(self) -> int:
        infos = [i for infos in self.layout.checkpoint.shards.values() for i in infos]
        return sum(info.nbytes for info in infos)

    @cached_property
    def file(self) -> GgufFile:
        """The file as the package `gguf` writes it.

        Raises:
            UserError: It is proven for none such; says what would do it.
        """
        from srlm_lite.model.gguf_read import GgufModel
        from srlm_lite.model.gguf_vocabulary import check_vocabulary, vocabulary_keys
        from srlm_lite.model.gguf_write import TYPES, GgufFile, family_of

        model, tokenizer = self._skeleton
        family = family_of(model)
        keys = vocabulary_keys(
            tokenizer,
            rows=model.config.vocab_size,
            ends=self.chat.stop_ids,
            last=self.chat.end_id,
            template=self.chat.portable_template,
        )
        texts = [self._render([{"role": "user", "content": _SAID}], True)]
        check_vocabulary(keys, family.architecture, tokenizer, texts)
        made = GgufFile(
            self.layout,
            model,
            self.plan,
            self.quantize if self.quantize in TYPES else _HALFWAY,
            vocabulary=keys,
            general=self._general(),
        )
        with TemporaryDirectory() as folder:
            made.write_head(Path(folder) / "head.gguf")
            apart = GgufModel(Path(folder) / "head.gguf").other_settings(
                model, unties=self.plan.unties
            )
        if apart:
            raise UserError(
                f"a GGUF file of this base would compute otherwise: {apart[0]}",
                where="--as gguf",
                way_out="llama.cpp's own converter may do it: name its directory in "
                f"{llama_cpp.SETTING}",
            )
        return made

    def _general(self) -> dict[str, Any]:
        source = self.files.source
        said: dict[str, Any] = {"name": self.source.name, "finetune": self.source.recipe.method}
        if source["kind"] == "hub":
            owner, _, name = source["location"].rpartition("/")
            said |= {
                "base_model.count": 1,
                "base_model.0.name": name,
                **({"base_model.0.organization": owner} if owner else {}),
                "base_model.0.repo_url": f"https://huggingface.co/{source['location']}",
                "base_model.0.version": source["revision"],
            }
        return said

    def _render(self, messages: Sequence[dict[str, str]], generation: bool) -> str:
        """A conversation as the exported chat template writes it."""
        tokens = copy.copy(self._skeleton[1])
        tokens.chat_template = self.chat.portable_template
        said: str = tokens.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation
        )
        return said

    @property
    def digest(self) -> str:
        return self._digest(quantize=self.quantize)

    def _weight_sizes(self, folder: Path) -> dict[str, int | None]:
        by_gguf = self._converter is None and self.quantize != "q4_k_m"
        return {self.name: self.file.size() if by_gguf else None}

    def write_companions(self, folder: Path) -> None:
        tokenizer, section = self._skeleton[1], self.source.recipe.base
        bos = tokenizer.bos_token or ""
        text = modelfile(
            self.name,
            title=self._title,
            template=go_template(self._render, bos=bos if self._adds_bos else ""),
            stops=tokenizer.convert_ids_to_tokens(list(self.chat.stop_ids)),
            window=section.window,
            system=section.system,
        )
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        write_card(
            folder,
            self.source,
            base=self.files.source,
            form=self.wish.form,
            onto=self.onto,
            dtype=self.rounding,
            rank=0,
            file=self.name,
        )

    @property
    def _adds_bos(self) -> bool:
        tokenizer = self._skeleton[1]
        ids = tokenizer("x").input_ids
        return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]

    def _needed(self) -> int:
        numbers = sum(info.nbytes // 4 for infos in self.plan.infos.values() for info in infos)
        bits = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q4_k_m": 5}[self.quantize]
        needed = int(numbers * bits / 8)
        if self.quantize == "q4_k_m":
            needed += 2 * numbers
        return needed + (4 * numbers if self._converter is not None else 0)

    def _write(self, draft: Path) -> None:
        target = draft / self.name
        if target.is_file():  # an earlier start of this export was stopped after that
            return
        halfway = self.quantize == "q4_k_m"
        first = draft / f".{_HALFWAY}.gguf" if halfway else target
        if not first.is_file():
            self._write_first(draft, first, _HALFWAY if halfway else self.quantize)
        if halfway:
            tool: Any = self._quantizer
            part = draft / ".quantized.tmp"
            try:
                llama_cpp.quantize(tool, first, part, self.quantize)
            except llama_cpp.LlamaCppError as error:
                shutil.rmtree(draft)
                raise UserError(
                    f"llama-quantize failed: {error}",
                    where="--quantize q4_k_m",
                    way_out="Say --quantize q8_0",
                ) from error
            first.unlink()
            part.replace(target)

    def _write_first(self, draft: Path, target: Path, kind: str) -> None:
        if self._converter is not None:
            part = draft / ".converted.tmp"
            try:
                self._write_merged(draft / "merged")
                llama_cpp.convert(self._converter, draft / "merged", part, kind)
            except llama_cpp.LlamaCppError as error:
                self.fell_back = str(error)
            finally:
                if self.fell_back or part.is_file():
                    shutil.rmtree(draft / "merged", ignore_errors=True)
            if not self.fell_back:
                part.replace(target)
                self._note_writer(draft, llama_cpp.CONVERTER)
                return
            part.unlink(missing_ok=True)
        try:
            file = self.file
        except UserError as error:
            if not self.fell_back:
                raise
            shutil.rmtree(draft)
            raise UserError(
                f"llama.cpp's converter does not take the model ({self.fell_back}), and neither "
                f"does the package gguf: {error.what}",
                where="--as gguf",
                way_out="Export with --as merged",
            ) from error
        task = megabytes(self._reporter, "merge", file.nbytes)
        file.write(target, self.weights, on_bytes=task.add)
        self._note_writer(draft, f"gguf {version('gguf')}")

    def _note_writer(self, draft: Path, writer: str) -> None:
        """Where the same command, stopped and begun again, finds who wrote the file."""
        write_json(draft / STATE, {"export": self.digest, "written_by": writer})

    def _write_merged(self, folder: Path) -> None:
        """The merged model as transformers' directory, in float32, for the converter."""
        from srlm_lite.model.checkpoint import NAMED
        from srlm_lite.model.companions import write_config, write_tokenizer
        from srlm_lite.model.merge import write

        folder.mkdir(exist_ok=True)
        base = self.files.folder
        write_config(base, folder, dtype=NAMED["float32"], unties=self.plan.unties)
        self.generation[0].save_pretrained(str(folder))
        write_tokenizer(folder, self._skeleton[1], self.chat)
        task = megabytes(self._reporter, "merge", self.plan.nbytes)
        write(self.plan, self.weights, folder, on_bytes=task.add)

    def _compare(self, draft: Path) -> dict[str, Any]:
        from srlm_lite.model.gguf_read import GgufModel, readable

        file, texts = draft / self.name, self._texts()
        facts = {
            "onto": self.onto,
            "file": self.name,
            "base_precision": self.precision,
            "written_by": self._writer(draft),
        }
        if not readable(file):
            return self._compare_by_llama_cpp(file, texts) | facts
        try:
            export = GgufModel(file)
        except UserError as error:
            raise ProofError(f"the written file cannot be read back: {error}") from error
        self._check_words(export)
        row, theirs = self._compare_read(export, texts)
        row |= facts
        row["stop_ids"] = {
            "in_file": export.ends,
            "missing": sorted({*self.chat.stop_ids} - {*export.ends}),
        }
        row["llama_cpp"] = self._ask_llama_cpp(file, texts, theirs)
        return row

    def _writer(self, draft: Path) -> str:
        first = read_json(draft / STATE).get("written_by", "")
        return f"{first} and {llama_cpp.QUANTIZER}" if self.quantize == "q4_k_m" else first

    def _check_words(self, export: GgufModel) -> None:
        """Settings, tokens and chat template of the file, against the base's.

        Raises:
            ProofError: They differ.
        """
        from srlm_lite.model.gguf_tokenizer import SAMPLES

        model, tokenizer = self._skeleton
        apart = export.other_settings(model, unties=self.plan.unties)
        if export.template != self.chat.portable_template:
            apart.append("another chat template")
        texts = [*SAMPLES, self._render([{"role": "user", "content": _SAID}], True)]
        for text in texts:
            if tokenizer(text).input_ids != export.tokenizer(text).input_ids:
                apart.append(f"other tokens for {text[:40]!r}")
        if apart:
            raise ProofError(
                f"the written file would compute otherwise: {apart[0]}. Nothing was kept"
            )

    def _compare_read(
        self, export: GgufModel, texts: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Any], Any]:
        """The file as it is read here, beside the stack: the row, and the file's logits."""
        from srlm_lite.model import parity
        from srlm_lite.model.gguf_read import GgufCheck

        nf4 = self.source.recipe.base.quantization == "nf4" and self.onto == "original"
        model = self._skeleton[0]
        check = GgufCheck(export, self.stack, exact=self.quantize != "q4_k_m")
        read = self._counting(self.weights.read, passes=2 if nf4 else 1)
        stacks = [self.stack, self.stack[:-1]]
        ours, without = parity.logits(model, check.reading(read), texts, stacks=stacks)
        check.rest(self.weights.read, self.layout.held_as)
        (theirs,) = parity.logits(export.model, export.read, texts)
        row = self._row(ours, without, theirs)
        row["tensors"] = {
            "most_different": check.worst,
            "relative_error": check.error,
            "tolerance": check.tolerance,
        }
        if not (row["max_abs_logit_diff"] <= row["tolerance"] and check.right):
            raise broken(row, check.worst, check.error, allowed=check.tolerance)
        if nf4:
            read = self._counting(self._weights(nf4=True).read)
            (evaluated,) = parity.logits(model, read, texts, stacks=[self.stack])
            row["against_nf4"] = parity.compare(evaluated, theirs).to_row()
        return row, theirs

    def _tolerance(self, stack: Any) -> float:
        largest = float(stack.abs().max())
        return _LOGITS[self.quantize] * largest if math.isfinite(largest) else 0.0

    @property
    def dtype_name(self) -> str:
        return self.quantize

    def _question(self, file: Path, contexts: Sequence[Sequence[int]]) -> llama_cpp.Asking:
        """What llama.cpp is asked of the file."""
        message = {"role": "user", "content": _SAID}
        return llama_cpp.Asking(
            str(file),
            contexts=contexts,
            top=self._skeleton[0].config.get_text_config().vocab_size,
            texts=[self._render([message], True)],
            messages=[message],
            ends=list(self.chat.stop_ids),
            threads=len(os.sched_getaffinity(0)),
        )

    def _ask_llama_cpp(
        self, file: Path, texts: Sequence[Sequence[int]], logits: Any
    ) -> dict[str, Any] | None:
        """llama.cpp beside the file's logits; None: it is not installed, or has no room for it.

        Raises:
            ProofError: It answers otherwise.
        """
        from srlm_lite.model import parity

        if not llama_cpp.installed() or file.stat().st_size > machine_memory() / 2:
            return None
        chosen = texts[:_CONTEXTS]
        answer = self._answer(file, chosen)
        return self._held_to(answer, parity.last_of(logits, texts)[: len(chosen)])

    def _answer(self, file: Path, contexts: Sequence[Sequence[int]]) -> llama_cpp.Told:
        try:
            return llama_cpp.ask(self._question(file, contexts))
        except llama_cpp.LlamaCppError as error:
            raise ProofError(
                f"llama.cpp cannot answer from the written file ({error}). Nothing was kept"
            ) from error

    def _held_to(self, answer: llama_cpp.Told, logits: Any) -> dict[str, Any]:
        """What llama.cpp says of the last token of each text, beside (texts, V) logits."""
        from srlm_lite.model import parity

        divergence, agreed = parity.beside(logits, answer.likely)
        (text,) = self._question(Path(), ()).texts
        same_ids = answer.ids[0] == self._skeleton[1](text).input_ids
        if not divergence <= _DIVERGENCE or not same_ids:
            why = f"its probabilities are {divergence:.3g} nats from the file's"
            raise ProofError(
                "llama.cpp answers from the written file otherwise: "
                f"{why if same_ids else 'it cuts text into other tokens'}. Nothing was kept"
            )
        bos = self._skeleton[1].bos_token or ""
        ended = dict(zip(self.chat.stop_ids, answer.ends, strict=True))
        return {
            "package": f"xllamacpp {version('xllamacpp')}",
            "positions": len(logits),
            "mean_kl": divergence,
            "top1_agreement": agreed,
            # Where BOS is added to text, llama.cpp takes it off what the template writes.
            "same_prompt": answer.prompt.removeprefix(bos) == text.removeprefix(bos),
            "template_error": answer.template_error,
            "not_ended_by": [token for token, ends in ended.items() if not ends],
        }

    def _compare_by_llama_cpp(self, file: Path, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The stack beside llama.cpp alone, for files that nothing here can read.

        Raises:
            UserError: llama.cpp's Python package is not installed.
            ProofError: They differ by more than rounding.
        """
        from srlm_lite.model import parity

        if not llama_cpp.installed():
            raise UserError(
                "nothing here can read the written file back, so it cannot be held against the "
                "stack",
                where="--as gguf",
                way_out="pip install xllamacpp, and the same command goes on",
            )
        chosen = [text for text in texts if text][:_CONTEXTS]
        read = self._counting(self.weights.read, passes=1)
        stacks = [self.stack, self.stack[:-1]]
        ours, without = parity.logits(self._skeleton[0], read, chosen, stacks=stacks)
        ours, without = parity.last_of(ours, chosen), parity.last_of(without, chosen)
        answer = self._answer(file, chosen)
        said = self._held_to(answer, ours)
        theirs = parity.spread(answer.likely, ours.shape[-1])
        row = self._row(ours.log_softmax(-1), without.log_softmax(-1), theirs)
        if not row["max_abs_logit_diff"] <= row["tolerance"]:
            raise broken(row, "the file", row["max_abs_logit_diff"])
        return row | {"llama_cpp": said}
