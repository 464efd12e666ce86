"""A library: certified experts, the trie that finds them, and what they are bound to; stored as one snapshot file.

File layout: magic, sha256 of all that follows, length of the header, the header as JSON (what the library is bound to,
and name, type, shape and place of every array), then the arrays, each aligned to 64 bytes: a library's arrays are views
of the mapped file (core.sealed), and what it answers is not changed by what happens to the file later. It is written
beside its target, synchronised and renamed, so a reader sees an old library or a new one, never half of one; a file
with any changed or missing byte is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import durable, sealed
from .card import Card
from .certificate import COLLAPSED, KINDS, Certificates, Ragged, decision_rows, limited
from .collapsed import inconsistency
from .errors import LibraryError
from .record import pack
from .statistical import Evidence
from .trie import Trie

MAGIC = b"LAWSLIB3"
BEFORE_ROUND = b"LAWSLIB2"  # still read: all its regions are boxes
BEFORE_KINDS = b"LAWSLIB1"  # still read: all its certificates are `linear`
_ALIGN = 64


@dataclass(frozen=True)
class Library:
    """Experts for one policy file, one card and one precision.

    Attributes:
        policy_sha256: of the ONNX file that the certificates speak about.
        card: of that policy.
        tolerance: [m] the action error, in action units, that the library was built for; empty for a decision.
        certificates: E certified experts.
        trie: finds them.
        visits: [E] training observations that each expert answered.
        notes: how it was built (workload, seed, coverage, ...), for people.
    """

    policy_sha256: str
    card: Card
    tolerance: NDArray[np.float64]
    certificates: Certificates
    trie: Trie
    visits: NDArray[np.int64]
    notes: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"

    def __len__(self) -> int:
        return len(self.certificates)

    @cached_property
    def ids(self) -> list[str]:
        """Content hash of every expert, bound to policy, card and precision; what people and merges call it by."""
        prefix = f"{self.policy_sha256}{self.card.digest}{self.precision}".encode()
        return [hashlib.sha256(prefix + pack(self.certificates, k)).hexdigest()[:16] for k in range(len(self))]

    @property
    def entropy(self) -> float:
        """Bits: of which expert answers, by Krichevsky-Trofimov estimates from `visits`; 0 without experts."""
        share = (self.visits + 0.5) / (self.visits.sum() + 0.5 * max(len(self), 1))
        return float(-(share * np.log2(share)).sum())

    def predicted(self, observations: float) -> float:
        """Experts that the paper's law, 2^H ln N, expects after N observations of the same workload."""
        return 2.0**self.entropy * math.log(max(observations, 1.0))

    @cached_property
    def digest(self) -> str:
        """sha256 of the library's content, 16 digits."""
        return _sha256(self._body()).hex()[:16]

    def indexed(self, trie: Trie) -> Library:
        """The same experts under a trie's questions, the cheapest first, and in no order that depends on history."""
        cost = self.certificates.cost
        preference = np.array(sorted(range(len(self)), key=lambda k: (cost[k], self.ids[k])), dtype=np.intp)
        return replace(self, trie=trie.with_regions(self.certificates.regions, preference))

    def check_policy(self, sha256: str, card: Card, where: str, policy_where: str) -> None:
        """Raise LibraryError unless this library was made for that policy file and card."""
        if sha256 != self.policy_sha256:
            raise LibraryError(
                f"{where}: made for the policy with sha256 {self.policy_sha256[:12]}..., but {policy_where} has "
                f"{sha256[:12]}...; build a library for this policy with `laws build`"
            )
        if card.digest != self.card.digest:
            raise LibraryError(
                f"{where}: made for another card than that of {policy_where}: {self.card.difference(card)} "
                "(library against policy)"
            )

    # -- storage ---------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return (
            _flat("certificates", self.certificates)
            | _flat("trie", self.trie)
            | {
                "tolerance": self.tolerance,
                "visits": self.visits,
            }
        )

    def _body(self) -> list[Any]:
        """The parts of the file behind its hash, for whoever takes bytes; arrays are not copied."""
        arrays = {k: np.ascontiguousarray(v) for k, v in self._arrays().items()}
        table, position = [], 0
        for name, array in arrays.items():
            table.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": position})
            position += -(-array.nbytes // _ALIGN) * _ALIGN
        header = json.dumps(
            {
                "policy_sha256": self.policy_sha256,
                "card": self.card.to_dict(),
                "card_digest": self.card.digest,
                "precision": self.precision,
                "notes": self.notes,
                "arrays": table,
            }
        ).encode()
        start = len(MAGIC) + 32 + 8 + len(header)
        parts: list[Any] = [struct.pack("<Q", len(header)), header, b"\0" * (-start % _ALIGN)]
        for array in arrays.values():
            parts += [array.reshape(-1).view(np.uint8), b"\0" * (-array.nbytes % _ALIGN)]
        return parts

    def save(self, path: str | Path) -> None:
        """Write the snapshot atomically.

        Raises:
            LibraryError: the folder does not exist or cannot be written, or the disk is full; an older file stays.
        """
        path = Path(path)
        body = self._body()
        try:
            durable.write(path, MAGIC, _sha256(body), *body)
        except OSError as error:
            raise LibraryError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: str | Path) -> Library:
        """Map a snapshot; processes that load the same one share its memory.

        Raises:
            LibraryError: missing, not a library, of another format, truncated or altered.
        """
        path = Path(path)
        try:
            data, intact = sealed.load(path, len(MAGIC))
        except OSError as error:
            raise LibraryError(f"{path}: cannot be read: {error.strerror}; `laws build` makes a library") from None
        magic, body = data[: len(MAGIC)], memoryview(data)[len(MAGIC) + 32 :]
        if not magic.startswith(MAGIC[:7]):
            raise LibraryError(f"{path}: not a LAWS library (it starts with {magic!r})")
        if magic not in (MAGIC, BEFORE_ROUND, BEFORE_KINDS):
            raise LibraryError(f"{path}: library format {magic!r}, this program reads {MAGIC!r}")
        if not intact:
            raise LibraryError(f"{path}: damaged: its content does not match its sha256; build or fetch it again")
        (length,) = struct.unpack_from("<Q", body)
        header = json.loads(bytes(body[8 : 8 + length]))
        start = len(MAGIC) + 32 + 8 + length
        start += -start % _ALIGN
        arrays: dict[str, NDArray[Any]] = {}
        for row in header["arrays"]:
            dtype, shape = np.dtype(row["dtype"]), tuple(row["shape"])
            count = int(np.prod(shape))
            arrays[row["name"]] = np.frombuffer(data, dtype, count, start + row["offset"]).reshape(shape)
        card = Card.from_dict(header["card"], f"{path}: card")

        def part(name: str, kind: type, known: list[str]) -> Any:
            return kind(**{k: arrays.pop(f"{name}.{k}") for k in known})

        try:
            names = [f.name for f in fields(Certificates)]
            if magic != MAGIC:
                names.remove("round")
            if magic != BEFORE_KINDS:
                for name in ("floats", "octets"):
                    arrays[f"certificates.{name}"] = part(f"certificates.{name}", Ragged, ["values", "start"])
            else:
                names = names[: names.index("kind")]
            certificates = part("certificates", Certificates, names)
            trie = part("trie", Trie, [f.name for f in fields(Trie)])
            tolerance, visits = arrays.pop("tolerance"), arrays.pop("visits")
        except KeyError as error:
            raise LibraryError(f"{path}: its array {error} is missing; build the library again") from None
        if arrays:
            raise LibraryError(f"{path}: holds {', '.join(arrays)}, which this program does not know; update laws_ros")
        library = cls(
            header["policy_sha256"], card, tolerance, certificates, trie, visits, header["notes"], header["precision"]
        )
        if magic == MAGIC:  # what would be written is what was read
            library.__dict__["digest"] = data[len(MAGIC) : len(MAGIC) + 32].hex()[:16]
        return library._checked(path)

    def _checked(self, path: Path) -> Library:
        """A hash says that the file is what was written; this says that what was written is a library."""
        n, count = len(self.card.observations), len(self)
        rows = len(decision_rows(len(self.card.actions), self.card.decision))
        shapes = {
            "center": (count, n),
            "transform": (count, n, n),
            "expert_weight": (count, rows, n),
            "expert_bias": (count, rows),
            "bound_weight": (count, rows, n),
            "bound_offset": (count, rows),
            "kind": (count,),
            "cost": (count,),
            "round": (count,),
        }
        for name, shape in shapes.items():
            found = getattr(self.certificates, name).shape
            if found != shape:
                raise LibraryError(f"{path}: certificates.{name} has shape {found}, {shape} is expected")
        if count and not 0 <= self.certificates.round.min() <= self.certificates.round.max() <= n:
            raise LibraryError(f"{path}: certificates.round is not between 0 and {n}; build the library again")
        self._check_kinds(path)
        t = self.trie
        nodes = len(t.axis)
        inner = t.axis >= 0
        children = np.concatenate([t.low[inner], t.high[inner]])
        parents = np.concatenate([np.flatnonzero(inner)] * 2)
        sound = (
            nodes > 0
            and all(len(a) == nodes for a in (t.threshold, t.low, t.high, t.visits))
            and len(t.first) == nodes + 1
            and (t.axis < n).all()
            and (children > parents).all()  # so that a walk ends
            and (children < nodes).all()
            and t.first[0] == 0
            and (np.diff(t.first) >= 0).all()
            and t.first[-1] == len(t.members)
            and ((t.members >= 0) & (t.members < count)).all()
        )
        if not sound:
            raise LibraryError(f"{path}: its trie is inconsistent; build the library again")
        if self.precision != "float32":
            raise LibraryError(f"{path}: certified for precision {self.precision!r}; this program runs float32")
        return self

    def _check_kinds(self, path: Path) -> None:
        c = self.certificates
        if len(c) and c.kind.max() >= len(KINDS):
            raise LibraryError(
                f"{path}: has certificates of kind number {c.kind.max()}; this program knows {', '.join(KINDS)}: "
                "update laws_ros"
            )
        for name in ("floats", "octets"):
            ragged = getattr(c, name)
            start = ragged.start
            if len(ragged) != len(c) or start[0] != 0 or start[-1] != len(ragged.values) or (np.diff(start) < 0).any():
                raise LibraryError(f"{path}: certificates.{name} is inconsistent; build the library again")
        for k in np.flatnonzero(limited(c)).tolist():
            if self.card.decision != "none" or not np.array_equal(c.floats.row(k), self.card.limits.ravel()):
                raise LibraryError(
                    f"{path}: region {self.ids[k]}: certified for other limits of the actions than the card's; "
                    "build the library again"
                )
        for k in np.flatnonzero(c.among([*COLLAPSED, "statistical"])).tolist():
            kind, octets, wrong = KINDS[c.kind[k]], c.octets.row(k), None
            if kind == "statistical":
                wrong = Evidence.inconsistency(octets)
            elif self.card.decision != "none":
                wrong = f"kind {kind} cannot decide by {self.card.decision}"
            else:
                wrong = inconsistency(octets, c.floats.row(k))
            if wrong:
                raise LibraryError(f"{path}: region {self.ids[k]}: {wrong}; build the library again")


def _sha256(parts: list[Any]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _flat(name: str, part: Certificates | Trie | Ragged) -> dict[str, NDArray[Any]]:
    """The arrays of a record, by their dotted names."""
    arrays: dict[str, NDArray[Any]] = {}
    for f in fields(part):
        value = getattr(part, f.name)
        arrays |= _flat(f"{name}.{f.name}", value) if isinstance(value, Ragged) else {f"{name}.{f.name}": value}
    return arrays
