"""The reliability campaign: what can befall a run, tried many times, with the figures in a table.

    make campaign
    make campaign ARGS="--only kills damage --n 10 --seed 3"

Every try says its seed and is the same again with it. A try ends in one of four ways: the results
are those of an undisturbed run (survived), the command has named what is wrong in one line and
exit code 2 (named), both of it: named, then gone on with to the same results (mended), or neither
(failed). The program ends with 1 where any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import OUTCOMES, Part, Place, Try, show


def parts() -> dict[str, Part]:
    """All there are; the libraries that they need are imported when one is asked for."""
    import damage
    import disk
    import fuzz
    import kills
    import odds
    import servers

    return {
        "kills": kills.tries,
        "disk": disk.tries,
        "damage": damage.tries,
        "fuzz": fuzz.tries,
        "odds": odds.tries,
        "servers": servers.tries,
    }


def table(found: list[Try]) -> str:
    """A row for each kind of try: how many, and how they ended."""
    kinds = list(dict.fromkeys((one.part, one.what) for one in found))
    counts = {kind: Counter(t.outcome for t in found if (t.part, t.what) == kind) for kind in kinds}
    head = f"{'part':<9}{'what':<44}{'tried':>6}" + "".join(f"{name:>10}" for name in OUTCOMES)
    rows = [
        f"{part:<9}{what:<44}{sum(counts[part, what].values()):>6}"
        + "".join(f"{counts[part, what][name]:>10}" for name in OUTCOMES)
        for part, what in kinds
    ]
    whole = Counter(one.outcome for one in found)
    last = f"{'all':<53}{len(found):>6}" + "".join(f"{whole[name]:>10}" for name in OUTCOMES)
    return "\n".join([head, *rows, last])


def main() -> int:
    known = parts()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument("--n", type=int, help="tries of each part; default: its own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", help="only kinds of tries whose name holds this")
    parser.add_argument("--out", type=Path, help="write every try here, as JSON lines")
    parser.add_argument("--within", type=float, help="seconds after which no new try begins")
    parser.add_argument("--folder", type=Path, help="work here, and keep what is undisturbed")
    wish = parser.parse_args()
    begun, found = time.monotonic(), []
    with contextlib.ExitStack() as stack:
        folder = wish.folder or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="srlm-lite-campaign-")
        )
        for name in wish.only:
            place = Place(Path(folder) / name, name, wish.seed, wish.n, wish.what)
            for one in known[name](place, Random(f"{wish.seed}/{name}")):
                found.append(one)
                show(one)
                if wish.out is not None:
                    with wish.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(one.row()) + "\n")
                if wish.within is not None and time.monotonic() - begun > wish.within:
                    print("the time is over", file=sys.stderr)
                    break
    print(table(found))
    print(f"seed {wish.seed}, {time.monotonic() - begun:.0f} s")
    return int(any(one.outcome == "failed" for one in found))


if __name__ == "__main__":
    raise SystemExit(main())
