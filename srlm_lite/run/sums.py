"""What a file that grows held when it was last written, so that a harmed one is not gone on with.

`done.json` has the hash of every file of a folder that is finished. Before that there are journals
of hours of sampling: beside each lies a file with the SHA-256 of all it held after each chunk. A
run from before these were written has none, and goes on without.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from srlm_lite.errors import UserError

_LINE = re.compile(rb"(\d+) ([0-9a-f]{64})")
_ENDING = ".sums"


def sums_of(path: Path) -> Path:
    """Where the sums of a file stand: hidden beside it."""
    return path.with_name(f".{path.name}{_ENDING}")


def summed_in(folder: Path) -> Iterator[Path]:
    """The files below a folder that have sums."""
    for sums in sorted(folder.rglob(f".*{_ENDING}")):
        yield sums.with_name(sums.name.removeprefix(".").removesuffix(_ENDING))


def is_harmed(path: Path) -> bool:
    """Whether a file begins otherwise than it was written.

    What was cut off its end is no harm: it is made again, to the same bytes. Nor is what stands
    behind the last sum: a process may have been killed between the two.
    """
    try:
        lines = sums_of(path).read_bytes().split(b"\n")
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    matches = [match for line in lines if (match := _LINE.fullmatch(line))]
    noted = [(int(found[1]), found[2].decode()) for found in matches]
    fitting = [(end, digest) for end, digest in noted if end <= size]
    if not fitting:
        return False
    end, digest = max(fitting)
    return _read(path, [end], hashlib.sha256()) != [digest]


def hold(path: Path) -> None:
    """Refuse a file that is harmed.

    Raises:
        UserError: It begins otherwise than the run has written it.
    """
    if is_harmed(path):
        raise UserError(
            "is not the file that the run has written: its hash is another one",
            where=str(path),
            way_out="Restore it, or delete it: the same command makes it again",
        )


class Sums:
    """The sums of a file while it grows.

    Args:
        ends: Bytes after each chunk that the file holds now; it ends with the last.
    """

    def __init__(self, path: Path, ends: Sequence[int]) -> None:
        self._place = sums_of(path)
        self._digest, self._size = hashlib.sha256(), ends[-1] if ends else 0
        found = _read(path, ends, self._digest)
        text = b"".join(_line(end, digest) for end, digest in zip(ends, found, strict=True))
        if not self._place.is_file() or self._place.read_bytes() != text:
            draft = self._place.with_name(f"{self._place.name}.tmp")
            draft.write_bytes(text)
            draft.replace(self._place)

    def add(self, data: bytes) -> None:
        """The file has been given these bytes, and they are on disk."""
        self._digest.update(data)
        self._size += len(data)
        with self._place.open("ab") as file:
            file.write(_line(self._size, self._digest.hexdigest()))


def note(path: Path) -> None:
    """Note a file as it is now, whole; the one before may have been a part of it."""
    Sums(path, [path.stat().st_size])


def forget(path: Path) -> None:
    """Delete the sums of a file: something else vouches for it."""
    sums_of(path).unlink(missing_ok=True)


def _line(end: int, digest: str) -> bytes:
    return f"{end} {digest}\n".encode()


def _read(path: Path, ends: Sequence[int], digest: hashlib._Hash) -> list[str]:
    """The digest of a file up to each of these places; it goes on behind the last."""
    found, at = [], 0
    with path.open("rb") as file:
        for end in ends:
            while at < end and (block := file.read(min(1 << 20, end - at))):
                digest.update(block)
                at += len(block)
            found.append(digest.hexdigest())
    return found
