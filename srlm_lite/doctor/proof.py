"""The proof of the adapter stack, run on the devices that are here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from srlm_lite.doctor.finding import Finding

WAYS: tuple[tuple[str, Literal["none", "nf4"]], ...] = (("unquantized", "none"), ("NF4", "nf4"))


def proof_findings() -> Iterator[Finding]:
    """One finding for each way to hold the base, on the device that a run would take."""
    from srlm_lite.training.selftest import prove_stack, toy_base

    for name, quantization in WAYS:
        try:
            base = toy_base(quantization=quantization)
            facts = prove_stack(base)
        except Exception as error:  # whatever breaks here breaks a run
            first = (str(error).strip().splitlines() or [""])[0]
            text = f"{type(error).__name__}: {first[:160]}"
            way_out = "base.quantization=none works without it" if name == "NF4" else None
            yield Finding("bad" if quantization == "none" else "warning", name, text, way_out)
            continue
        dtype = str(base.dtype).removeprefix("torch.")
        text = (
            f"{dtype} on {base.device}: first loss {facts['step0_loss']:.6f} "
            f"(ln 2 = {math.log(2):.6f}), margin {facts['step0_margin']:.6f}, "
            f"anchor and base unchanged, {facts['seconds']:.1f} s"
        )
        yield Finding("ok", name, text, facts={**facts, "dtype": dtype, "device": str(base.device)})
