"""What robots tell each other, as a grow-only set with tombstones, and as bytes.

Three kinds of items: certified experts (core.record) and tombstones, each named by its content, and takeovers by an
operator (fleet.corrections), named by robot and time. A tombstone names another item, which is out of force while the
tombstone is in force; as a tombstone may name a tombstone, what was withdrawn can be given back, without clocks and
without counting. Merging is the union of sets: in any order, with any repetition, all robots end with the same set, and
what is in force is a function of the set. (A tombstone's name is a hash of what it names, so no chain of them can bite
its own tail.)

A chunk is some of these items, and observations that no expert answered, compressed, for one policy, card and
precision. Chunks are content-addressed: the same items give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Card
from laws_ros.core.certificate import Certificates, Ragged, decision_rows
from laws_ros.core.errors import FleetError, LibraryError, RefusedError
from laws_ros.core.record import pack, unpack

FORMAT = 1
MOST_CHUNK = 1 << 20  # bytes, compressed; nothing larger is made, sent or read
MOST_RAW = 1 << 24  # bytes, not compressed
_MAGIC = b"LAWSCHK"
_HEAD = struct.Struct("<7sB32sI")  # magic, format, identity, length when not compressed
_FIXED = [f.name for f in fields(Certificates) if f.name not in ("floats", "octets")]
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 20, "lc": 0, "lp": 0, "pb": 0}]


@dataclass(frozen=True)
class Identity:
    """What experts are bound to; those of another identity are never mixed in."""

    policy_sha256: str
    card: Card
    precision: str = "float32"

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.policy_sha256}{self.card.digest}{self.precision}".encode()).digest()

    def name(self, record: bytes) -> str:
        """An expert's id, as core.library has it."""
        prefix = f"{self.policy_sha256}{self.card.digest}{self.precision}".encode()
        return hashlib.sha256(prefix + record).hexdigest()[:16]

    @property
    def inputs(self) -> int:
        return len(self.card.observations)

    @property
    def rows(self) -> int:
        return len(decision_rows(len(self.card.actions), self.card.decision))


@dataclass(frozen=True)
class Items:
    """A set of items.

    Attributes:
        experts: id -> record. takeovers: ROBOT.ID -> their log as JSON. tombstones: sha256 -> JSON with "of" (a name
            of any item), "reason" and "by".
    """

    experts: Mapping[str, bytes] = field(default_factory=dict)
    takeovers: Mapping[str, bytes] = field(default_factory=dict)
    tombstones: Mapping[str, bytes] = field(default_factory=dict)

    def __or__(self, other: Items) -> Items:
        return Items(*(_union(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def __sub__(self, other: Items) -> Items:
        """The items of this set that the other one lacks."""
        return Items(
            *(
                {name: data for name, data in getattr(self, f.name).items() if getattr(other, f.name).get(name) != data}
                for f in fields(self)
            )
        )

    def __len__(self) -> int:
        return len(self.experts) + len(self.takeovers) + len(self.tombstones)

    def out(self) -> dict[str, str]:
        """Names that tombstones in force withdraw, and why; not all of them need be in this set."""
        of: dict[str, list[str]] = {}
        for name, data in self.tombstones.items():
            of.setdefault(json.loads(data)["of"], []).append(name)

        verdicts: dict[str, bool] = {}

        def withdrawn(name: str) -> bool:
            todo = [name]  # no recursion: a chain may be as long as somebody likes
            while todo:
                here = todo[-1]
                waiting = [t for t in of.get(here, []) if t not in verdicts]
                if waiting:
                    todo += waiting
                else:
                    verdicts[here] = any(not verdicts[t] for t in of.get(here, []))
                    todo.pop()
            return verdicts[name]

        return {
            name: str(json.loads(min(self.tombstones[t] for t in stones if not withdrawn(t)))["reason"])
            for name, stones in of.items()
            if withdrawn(name)
        }


def _union(a: Mapping[str, bytes], b: Mapping[str, bytes]) -> dict[str, bytes]:
    # Of two contents of one name (a takeover that was told before it was over) the larger one, whatever comes first.
    both = {name: max(a[name], b[name], key=lambda data: (len(data), data)) for name in a.keys() & b.keys()}
    return dict(sorted({**a, **b, **both}.items()))


def content_name(data: bytes) -> str:
    """The name of a tombstone, and of a chunk."""
    return hashlib.sha256(data).hexdigest()


def tombstone(of: str, reason: str, by: str) -> Items:
    """One that withdraws an item."""
    data = json.dumps({"by": by, "of": of, "reason": reason}, sort_keys=True).encode()
    return Items(tombstones={content_name(data): data})


@dataclass(frozen=True)
class Chunk:
    """What travels in one piece.

    Attributes:
        misses: [N, n] observations that no expert answered.
    """

    items: Items
    misses: NDArray[np.float32]


def chunks(identity: Identity, items: Items, misses: NDArray[np.float32] | None = None) -> Iterator[bytes]:
    """Items as chunks, each within the limits: experts, takeovers, tombstones, then observations.

    Raises:
        FleetError: one item alone is over the limit.
    """
    none = np.zeros((0, identity.inputs), np.float32)
    for name in (f.name for f in fields(items)):
        some = partial(_some, name, none)
        yield from _split(identity, sorted(getattr(items, name).items()), some)
    if misses is not None:
        yield from _split(identity, misses, partial(Chunk, Items()))


def _some(kind: str, none: NDArray[np.float32], units: list[tuple[str, bytes]]) -> Chunk:
    return Chunk(Items(**{kind: dict(units)}), none)


def _split(identity: Identity, units: Any, made: Callable[[Any], Chunk]) -> Iterator[bytes]:
    if not len(units):
        return
    try:
        data = encode(identity, made(units))
    except FleetError:
        if len(units) == 1:
            raise
        half = len(units) // 2
        yield from _split(identity, units[:half], made)
        yield from _split(identity, units[half:], made)
    else:
        yield data


def encode(identity: Identity, chunk: Chunk) -> bytes:
    """A chunk's bytes.

    Raises:
        FleetError: it is over the limits.
    """
    items = chunk.items
    records = [items.experts[name] for name in sorted(items.experts)]
    parts = [struct.pack("<4I", len(records), len(items.takeovers), len(items.tombstones), len(chunk.misses))]
    found = unpack(records, identity.inputs, identity.rows)
    parts += [_planes(getattr(found, name)) for name in _FIXED]
    for ragged in (found.floats, found.octets):
        parts += [_planes(np.diff(ragged.start).astype("<u4")), _planes(ragged.values)]
    parts.append(_planes(np.asarray(chunk.misses, "<f4")))
    for texts in (items.takeovers, items.tombstones):
        parts += [struct.pack("<I", len(texts[name])) + texts[name] for name in sorted(texts)]
    raw = b"".join(parts)
    if len(raw) <= MOST_RAW:
        packed = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_FILTERS)
        if _HEAD.size + len(packed) <= MOST_CHUNK:
            return _HEAD.pack(_MAGIC, FORMAT, identity.digest, len(raw)) + packed
    raise FleetError(
        f"{len(records)} experts and {len(chunk.misses)} observations are {len(raw)} bytes: over the limit of "
        f"{MOST_CHUNK} bytes, compressed, or {MOST_RAW}, that travel in one piece"
    )


def decode(data: bytes, identity: Identity, where: str) -> Chunk:
    """What a chunk holds; nothing is proved yet.

    Raises:
        RefusedError: over the limits, of another identity or a newer format, or not whole.
    """
    if len(data) > MOST_CHUNK:
        raise RefusedError(f"{where}: {len(data)} bytes, at most {MOST_CHUNK} are read")
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise RefusedError(f"{where}: no chunk of experts (it starts with {data[:8]!r})")
    _, version, digest, length = _HEAD.unpack_from(data)
    if version != FORMAT:
        raise RefusedError(f"{where}: chunk format {version}, this program reads {FORMAT}; update laws_ros")
    if digest != identity.digest:
        raise RefusedError(
            f"{where}: made for another policy, card or precision than {identity.card.name} with policy sha256 "
            f"{identity.policy_sha256[:12]}... and precision {identity.precision}"
        )
    if length > MOST_RAW:
        raise RefusedError(f"{where}: claims {length} bytes, at most {MOST_RAW} are read")
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
        raw = unpacker.decompress(data[_HEAD.size :], max_length=length + 1)
        if len(raw) != length:
            raise ValueError(f"{len(raw)} bytes instead of {length}")
        return _Reader(raw).chunk(identity)
    except (lzma.LZMAError, ValueError, KeyError, TypeError, IndexError, struct.error, LibraryError) as error:
        raise RefusedError(f"{where}: not a whole chunk ({error})") from None


def _planes(array: NDArray[Any]) -> bytes:
    """Numbers byte by byte: the first byte of each, then the second, ...; exponents compress, mantissas do not."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()


class _Reader:
    """Takes a chunk's bytes apart; anything that does not fit is a ValueError."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def chunk(self, identity: Identity) -> Chunk:
        experts, takeovers, tombstones, misses = struct.unpack("<4I", self.bytes(16))
        blank = Certificates.none(identity.inputs, identity.rows)
        fixed = {}
        for name in _FIXED:
            array = getattr(blank, name)
            fixed[name] = self.array(array.dtype, (experts, *array.shape[1:]))
        found = Certificates(**fixed, floats=self.ragged(np.float32, experts), octets=self.ragged(np.uint8, experts))
        records = [pack(found, k) for k in range(experts)]
        observations = self.array(np.float32, (misses, identity.inputs))
        texts = [[self.bytes(*struct.unpack("<I", self.bytes(4))) for _ in range(n)] for n in (takeovers, tombstones)]
        for text in texts[1]:
            told = json.loads(text)
            if set(told) != {"of", "reason", "by"} or not all(isinstance(value, str) for value in told.values()):
                raise ValueError("a tombstone without of, reason and by")
        if self.at != len(self.raw):
            raise ValueError(f"{len(self.raw) - self.at} bytes too many")
        items = Items(
            {identity.name(record): record for record in records},
            {str(json.loads(text)[0]["takeover"]): text for text in texts[0]},
            {content_name(text): text for text in texts[1]},
        )
        return Chunk(items, observations)

    def bytes(self, count: int) -> bytes:
        part = self.raw[self.at : self.at + count]
        if len(part) != count:
            raise ValueError("it ends too early")
        self.at += count
        return part

    def array(self, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        size, count = np.dtype(dtype).itemsize, math.prod(shape)
        planes = np.frombuffer(self.bytes(size * count), np.uint8).reshape(size, count)
        return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)

    def ragged(self, dtype: Any, count: int) -> Ragged:
        start = np.concatenate([[0], np.cumsum(self.array("<u4", (count,)).astype(np.int64))])
        return Ragged(self.array(dtype, (int(start[-1]),)), start)
