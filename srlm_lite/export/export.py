"""Export a model of a run: check, merge, compare, and only then give it its name.

Everything is written to a hidden directory beside the target, which gets the target's name when
the export has been found to answer as the stack does. A killed export leaves the hidden directory;
the same command goes on with the files that are whole in it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srlm_lite.errors import ProofError, UserError
from srlm_lite.export.card import write_card
from srlm_lite.export.hub import files_of
from srlm_lite.export.source import FinishedModel
from srlm_lite.hardware import amount
from srlm_lite.progress import Reporter, Silent, Task
from srlm_lite.run.files import read_json, write_json
from srlm_lite.shipped import short_base

if TYPE_CHECKING:
    from srlm_lite.model.base import BaseFiles
    from srlm_lite.model.chat import ChatFormat
    from srlm_lite.model.layout import Layout, Read
    from srlm_lite.model.merge import MergePlan, Onto, Weights
    from srlm_lite.model.stack import Adapter

Form = Literal["merged", "adapter", "gguf"]
Quantize = Literal["f16", "bf16", "q8_0", "q4_k_m"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

PARITY = "parity.json"
STATE = ".export.json"
_TOKENS = 48
"""Length of each text that stack and export are compared on."""
_SLACK = 64 << 20
"""Disk space for what comes beside the weights."""


@dataclass(frozen=True, slots=True)
class ExportWish:
    """What the user asked for. `onto` None: the original where there is one."""

    out: Path
    form: Form = "merged"
    onto: Onto | None = None
    dtype: Dtype = "auto"
    quantize: Quantize | None = None
    """A GGUF file's type; None: the 16 bits that the base has."""
    base_id: str | None = None
    """Where others find an adapter's base: ORG/NAME on the Hub, or ORG/NAME@REVISION."""


class Export:
    """One export at work.

    Raises:
        UserError: On construction: the base or the stack is not what the run had, or what is wished
            for does not exist.
    """

    def __init__(self, source: FinishedModel, wish: ExportWish, reporter: Reporter) -> None:
        self.source, self.wish, self._reporter = source, wish, reporter
        self.files: BaseFiles = source.base_files()
        self.stack: list[Adapter] = source.stack()
        self.onto = self._onto()
        self._progress = megabytes(Silent(), "parity", 0)

    def _onto(self) -> Onto:
        if self.files.kind != "gguf":
            return self.wish.onto or "original"
        if self.wish.onto == "original":
            raise UserError(
                f"{self.source.recipe.base.name} is a GGUF file: it holds quantized weights only, "
                "there is no 16-bit original to merge onto",
                where="--onto",
                way_out="Leave it out, or say --onto dequantized: the weights as the adapters "
                "were trained against",
            )
        return "dequantized"

    @cached_property
    def _skeleton(self) -> Any:
        from srlm_lite.model.base import skeleton

        return skeleton(self.files.folder)

    @cached_property
    def chat(self) -> ChatFormat:
        from srlm_lite.model.chat import ChatFormat

        model, tokenizer = self._skeleton
        ends = model.generation_config.eos_token_id or ()
        section = self.source.recipe.base
        return ChatFormat(
            tokenizer,
            template=section.chat_template,
            settings=section.chat_template_kwargs,
            system=section.system,
            stop_ids=ends,
        )

    @cached_property
    def generation(self) -> tuple[Any, str]:
        """The merged model's generation config, and a line on what of the base's is not in it."""
        from srlm_lite.model.companions import generation_config

        return generation_config(self.files.folder, self._skeleton[0], self.chat)

    @property
    def public_base(self) -> tuple[str, str | None]:
        """By which name, and commit, others find the base; no path of this machine.

        Of a base that is not from the Hub, that is what `--base-id` says, else a name alone.
        """
        if self.wish.base_id is not None:
            name, _, revision = self.wish.base_id.partition("@")
            return name, revision or None
        source = self.files.source
        if source["kind"] == "hub":
            return source["location"], source["revision"]
        return short_base(source["name"]), None

    @property
    def names_a_base(self) -> bool:
        """Whether loading the adapter finds the base by itself."""
        return self.wish.base_id is not None or self.files.kind == "hub"

    @cached_property
    def placing(self) -> dict[str, Any]:
        """How the adapter's settings name its modules for PEFT."""
        from srlm_lite.model.exportable import placing

        return placing(
            self._skeleton[0],
            list(dict.fromkeys(name for each in self.stack for name in each.factors)),
        )

    @cached_property
    def layout(self) -> Layout:
        """What the base's files are in memory."""
        from srlm_lite.model.checkpoint import Checkpoint
        from srlm_lite.model.layout import Layout

        return Layout(Checkpoint(self.files.folder), self._skeleton[0])

    @cached_property
    def weights(self) -> Weights:
        """The base's tensors, as they are merged onto."""
        return self._weights(nf4=self.onto == "dequantized" and self.wish.form != "adapter")

    @cached_property
    def plan(self) -> MergePlan:
        """What the merged checkpoint will hold."""
        from srlm_lite.model.merge import plan

        return plan(self.layout, self.stack, dtype=self._asked_dtype)

    @property
    def nbytes(self) -> int:
        """Size of the weights to be written."""
        if self.wish.form == "merged":
            return self.plan.nbytes
        numbers = sum(f.numel() for a in self.stack for pair in a.factors.values() for f in pair)
        return numbers * int(self._dtype.itemsize)

    def _needed(self) -> int:
        """Bytes on the disk while the weights are written."""
        return self.nbytes

    def listing(self) -> list[tuple[str, int | None]]:
        """Name and bytes of every file that it is made of; None: not known before it is made."""
        if self.finished is not None:
            return [*files_of(self.wish.out)]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            self.write_companions(folder)
            weights = self._weight_sizes(folder)
            return sorted([*files_of(folder), *weights.items(), (PARITY, None)], key=itemgetter(0))

    def _weight_sizes(self, folder: Path) -> dict[str, int | None]:
        """Bytes of the files with weights; the index of several is written into the folder."""
        if self.wish.form == "adapter":
            from srlm_lite.model.stack import CONFIG, WEIGHTS

            return {WEIGHTS: self.nbytes, CONFIG: None}
        from srlm_lite.model.checkpoint import shard_bytes, write_index

        if self.plan.is_sharded:
            write_index(folder, self.plan.infos)
        return {file: shard_bytes(infos) for file, infos in self.plan.infos.items()}

    @property
    def digest(self) -> str:
        """What makes two exports the same export."""
        return self._digest(**({"base_id": self.wish.base_id} if self.wish.base_id else {}))

    def _digest(self, **more: str) -> str:
        return hashlib.sha256(
            json.dumps(
                {
                    "base": [self.files.source.get(key) for key in ("sha256", "revision")],
                    "stack": self.source.hashes,
                    "form": self.wish.form,
                    "onto": self.onto,
                    "dtype": self.wish.dtype,
                    "template": self.chat.portable_template,
                    **more,
                }
            ).encode()
        ).hexdigest()

    @property
    def finished(self) -> dict[str, Any] | None:
        """The parity of this very export, if it lies at the target already."""
        path = self.wish.out / PARITY
        if not path.is_file():
            return None
        row = read_json(path)
        return row if row.get("export") == self.digest else None

    def make(self) -> dict[str, Any]:
        """Write the export, compare it with the stack, and give it its name; the parity.

        Raises:
            UserError: The target is taken, or the disk too small.
            ProofError: The export does not answer as the stack does; nothing is left of it.
        """
        if (done := self.finished) is not None:
            return done
        out = self.wish.out
        if (out.is_dir() and any(out.iterdir())) or out.is_file():
            raise UserError(
                "exists already, and is not this export",
                where=str(out),
                way_out="Choose another --out, or delete it",
            )
        needed = self._needed()  # planned before anything is written: the plan may refuse
        if self.wish.form == "adapter":
            _ = self.placing
        with self._draft() as draft, _disk_errors(out):
            self._check_space(draft, needed)
            self.write_companions(draft)  # first: they may be what cannot be written
            self._write(draft)
            try:
                row = self._compare(draft)
            except ProofError:
                shutil.rmtree(draft)
                raise
            (draft / STATE).unlink()
            write_json(draft / PARITY, row)
            draft.rename(out)
        return row

    def write_companions(self, folder: Path) -> None:
        """All files but the weights and their parity."""
        from srlm_lite.model.companions import (
            copy_processors,
            write_config,
            write_tokenizer,
        )

        if self.wish.form == "merged":
            base = self.files.folder
            write_config(base, folder, dtype=self._dtype, unties=self.plan.unties)
            self.generation[0].save_pretrained(str(folder))
            copy_processors(base, folder)
        write_tokenizer(folder, self._skeleton[1], self.chat)
        write_card(
            folder,
            self.source,
            base=self.files.source,
            form=self.wish.form,
            onto=self.onto,
            dtype=self.dtype_name,
            rank=sum(adapter.rank for adapter in self.stack),
            named=self.public_base if self.names_a_base else None,
        )

    def _weights(self, *, nf4: bool) -> Weights:
        from srlm_lite.model.merge import base_weights

        section = self.source.recipe.base
        return base_weights(self.layout, section, self._skeleton[0], nf4=nf4)

    @property
    def _asked_dtype(self) -> Any:
        """As torch knows it; None: each tensor's own."""
        from srlm_lite.model.checkpoint import NAMED

        return NAMED.get(self.wish.dtype)

    @property
    def _dtype(self) -> Any:
        """The dtype of the result: as asked, else the base's own; an adapter's is float32."""
        from srlm_lite.model.checkpoint import NAMED

        if self.wish.form == "adapter":
            return self._asked_dtype or NAMED["float32"]
        return self._asked_dtype or self.layout.checkpoint.main_dtype

    @contextmanager
    def _draft(self) -> Iterator[Path]:
        """The hidden directory, with what an earlier start of this export has left in it."""
        out = self.wish.out
        draft = out.with_name(f".{out.name}.partial")
        try:
            draft.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(
                f"cannot be written ({error.strerror})", where=str(out), way_out="Choose another"
            ) from error
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = draft / STATE
            if not state.is_file() or read_json(state).get("export") != self.digest:
                for file in draft.iterdir():
                    if file.is_dir():
                        shutil.rmtree(file)
                    else:
                        file.unlink()
                write_json(state, {"export": self.digest})
            yield draft
        except BlockingIOError as error:
            raise UserError("another export is being written here", where=str(out)) from error
        finally:
            os.close(lock)

    def _check_space(self, draft: Path, nbytes: int) -> None:
        endings = (".safetensors", ".gguf")
        files = [file for file in draft.rglob("*") if file.suffix in endings]
        there = sum(file.stat().st_size for file in files)
        needed, free = nbytes - there + _SLACK, shutil.disk_usage(draft).free
        if needed > free:
            kept = f"; what an earlier start has written is kept in {draft}" if there else ""
            if not there:
                shutil.rmtree(draft)
            raise UserError(
                f"the export needs {amount(needed)}, and {amount(free)} are free",
                where=str(self.wish.out),
                way_out=f"Make room, or choose another disk for --out{kept}",
            )

    def _write(self, draft: Path) -> None:
        if self.wish.form == "merged":
            from srlm_lite.model.merge import write

            task = megabytes(self._reporter, "merge", self.plan.nbytes)
            write(self.plan, self.weights, draft, on_bytes=task.add)
            return
        from srlm_lite.model.stack import fuse

        base_name, revision = self.public_base
        fuse(self.stack).save(
            draft,
            base_name=base_name,
            revision=revision,
            dtype=self._dtype,
            placing=self.placing,
        )

    def _compare(self, draft: Path) -> dict[str, Any]:
        """Stack and export on the same texts.

        Raises:
            ProofError: They differ by more than rounding.
        """
        from srlm_lite.model import parity

        texts = self._texts()
        if self.wish.form == "merged":
            return self._compare_merged(draft, texts)
        from srlm_lite.model.stack import Adapter

        read = self._counting(self._weights(nf4=False).read, passes=1)
        stacks = [self.stack, self.stack[:-1], [Adapter.load(draft)]]
        ours, without, theirs = parity.logits(self._skeleton[0], read, texts, stacks=stacks)
        row = self._row(ours, without, theirs)
        if not row["max_abs_logit_diff"] <= row["tolerance"]:
            worst, share = parity.most_different_module(stacks[2][0], self.stack)
            raise broken(row, worst, share)
        return row

    def _compare_merged(self, draft: Path, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        from srlm_lite.model import parity
        from srlm_lite.model.base import skeleton
        from srlm_lite.model.checkpoint import Checkpoint
        from srlm_lite.model.layout import Layout

        nf4 = self.source.recipe.base.quantization == "nf4"
        model, (exported, _) = self._skeleton[0], skeleton(draft)
        export = Layout(Checkpoint(draft), exported)
        passes = 3 if nf4 and self.onto == "original" else 2
        check = parity.TensorCheck(self.layout, self.stack, export)
        read = self._counting(self.weights.read, passes=passes)
        stacks = [self.stack, self.stack[:-1]]
        ours, without = parity.logits(model, check.reading(read), texts, stacks=stacks)
        check.rest(self.weights.read)
        (theirs,) = parity.logits(exported, self._counting(export.read), texts)
        row = self._row(ours, without, theirs)
        row["tensors"] = {
            "most_different": check.worst,
            "relative_error": check.error,
            "tolerance": parity.tensor_tolerance(self._dtype),
        }
        row["onto"] = self.onto
        if not (
            row["max_abs_logit_diff"] <= row["tolerance"]
            and check.error <= row["tensors"]["tolerance"]
        ):
            raise broken(row, check.worst, check.error, allowed=row["tensors"]["tolerance"])
        if passes == 3:
            read = self._counting(self._weights(nf4=True).read)
            (evaluated,) = parity.logits(model, read, texts, stacks=[self.stack])
            row["against_nf4"] = parity.compare(evaluated, theirs).to_row()
        return row

    def _row(self, ours: Any, without: Any, theirs: Any) -> dict[str, Any]:
        from srlm_lite.model import parity

        return {
            **parity.compare(ours, theirs).to_row(),
            "tolerance": self._tolerance(ours),
            "last_adapter_mean_abs_logit_diff": parity.compare(ours, without).mean_abs_logit_diff,
            "form": self.wish.form,
            "dtype": self.dtype_name,
            "export": self.digest,
        }

    def _tolerance(self, stack: Any) -> float:
        """How far rounding may move any of the stack's logits."""
        from srlm_lite.model import parity

        return parity.tolerance(self._dtype, stack)

    @property
    def dtype_name(self) -> str:
        """What the weights are rounded to, in a word."""
        return str(self._dtype).removeprefix("torch.")

    def _texts(self) -> list[list[int]]:
        texts = []
        for prompt, answer in self.source.texts():
            ids = self.chat.policy_ids(prompt)[:_TOKENS]
            reply = self.chat.target_ids(answer) if answer else []
            texts.append([*ids, *reply][:_TOKENS])
        return texts

    def _counting(self, read: Read, *, passes: int = 0) -> Read:
        """A reader that moves the bar; with `passes`, a bar for so many readings begins."""
        if passes:
            self._progress = megabytes(self._reporter, "parity", passes * self.nbytes)
        progress = self._progress

        def counted(name: str) -> Any:
            tensor = read(name)
            progress.add(tensor.nbytes)
            return tensor

        return counted


def megabytes(reporter: Reporter, name: str, nbytes: int) -> Megabytes:
    """A bar for so many bytes."""
    return Megabytes(reporter.start(name, nbytes // 10**6, "MB"))


class Megabytes:
    """A bar in megabytes, told in bytes."""

    def __init__(self, task: Task) -> None:
        self._task, self._bytes = task, 0

    def add(self, count: int) -> None:
        before = self._bytes // 10**6
        self._bytes += count
        self._task.advance(self._bytes // 10**6 - before)


def broken(row: dict[str, Any], worst: str, share: float, *, allowed: float = 0.0) -> ProofError:
    """Why an export is not kept; `share` is the error of its worst tensor."""
    if not row["tolerance"]:
        why = "the stack's own logits are not all finite"
    elif share <= allowed:
        why = (
            "every tensor is right, so the base computes with a layer's weight past the adapter "
            "that lies on the layer"
        )
    else:
        why = f"{worst} differs most, by {share:.3g} of its norm"
    return ProofError(
        "the export does not answer as the stack does: logits differ by up to "
        f"{row['max_abs_logit_diff']:.3g} (tolerance {row['tolerance']:.3g}); {why}. Nothing was "
        "kept"
    )


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            "the disk is full", where=str(out), way_out="Make room; the same command goes on"
        ) from error
