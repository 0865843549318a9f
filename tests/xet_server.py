"""The storage behind a Hub that offers Xet, small: what the client `hf_xet` asks of one.

The client cuts files into chunks, packs chunks into xorbs, uploads those, and then a shard: which
chunks of which xorbs make up each file. To download, it asks for that list and fetches ranges of
xorbs. Layouts are those of the protocol's specification: https://huggingface.co/docs/xet
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

_ENTRY = 48
"""Bytes of every entry in a shard, and of its head."""
_BOOKEND = b"\xff" * 32
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb: a part of a file."""

    xorb: str
    size: int
    """The size of the part, in bytes."""
    first: int
    end: int
    """Chunks from the first up to this one."""


@dataclass(frozen=True)
class XetFile:
    """A file as a shard describes it."""

    hash: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


@dataclass
class Cas:
    """What has been uploaded."""

    token: str
    """A token of this storage: not the Hub's."""
    xorbs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    """Xorbs in the order they came in, again and again if need be."""
    by_sha256: dict[str, XetFile] = field(default_factory=dict)
    by_hash: dict[str, XetFile] = field(default_factory=dict)
    xorbs_allowed: int = 10**9
    """After so many the storage fails."""

    def put_xorb(self, name: str, body: bytes) -> bool:
        """False where it fails."""
        if self.xorbs_allowed <= 0:
            return False
        self.xorbs_allowed -= 1
        self.uploads.append(name)
        self.xorbs[name] = body
        return True

    def put_shard(self, body: bytes) -> None:
        """Learn how files are put together; KeyError where a xorb is missing."""
        at = _ENTRY
        while (raw := body[at : at + 32]) != _BOOKEND:
            flags, count = struct.unpack_from("<II", body, at + 32)
            terms = []
            for place in range(at + _ENTRY, at + _ENTRY * (count + 1), _ENTRY):
                xorb = _name(body[place : place + 32])
                size, first, end = struct.unpack_from("<III", body, place + 36)
                terms.append(Term(xorb, size, first, end))
                _ = self.xorbs[xorb]
            at += _ENTRY * (1 + count * (2 if flags & _WITH_VERIFICATION else 1))
            file = XetFile(_name(raw), tuple(terms))
            self.by_hash[file.hash] = file
            if flags & _WITH_SHA256:
                self.by_sha256[_name(body[at : at + 32])] = file
                at += _ENTRY

    def reconstruction(self, name: str, start: int, end: int, url: str) -> dict[str, Any] | None:
        """Where the bytes of a file from `start` up to `end` are; None past its end."""
        terms: list[Term] = []
        skipped = at = 0
        for term in self.by_hash[name].terms:
            if at < end and at + term.size > start:
                skipped = skipped if terms else start - at
                terms.append(term)
            at += term.size
        if not terms:
            return None
        fetch: dict[str, list[dict[str, Any]]] = {}
        for term in terms:
            offsets = _chunk_offsets(self.xorbs[term.xorb])
            part = {"start": term.first, "end": term.end}
            # The last byte counts.
            bytes_ = {"start": offsets[term.first], "end": offsets[term.end] - 1}
            fetch.setdefault(term.xorb, []).append(
                {"range": part, "url": f"{url}/{term.xorb}", "url_range": bytes_}
            )
        return {
            "offset_into_first_range": skipped,
            "terms": [
                {
                    "hash": term.xorb,
                    "unpacked_length": term.size,
                    "range": {"start": term.first, "end": term.end},
                }
                for term in terms
            ],
            "fetch_info": fetch,
        }


def _name(raw: bytes) -> str:
    """A hash as it stands in addresses: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk starts, and where the last one ends."""
    offsets = [0]
    while offsets[-1] < len(xorb) and xorb[offsets[-1] : offsets[-1] + 7] != b"XETBLOB":
        packed = int.from_bytes(xorb[offsets[-1] + 1 : offsets[-1] + 4], "little")
        offsets.append(offsets[-1] + 8 + packed)
    return offsets
