"""One certified expert as bytes: what the history stores, fleets exchange and content hashes are of."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from .certificate import KINDS, Certificates, Ragged
from .errors import LibraryError

_HEAD = struct.Struct("<BqIIHH")  # kind, cost, lengths of floats and octets, observations, rows


def pack(certificates: Certificates, k: int) -> bytes:
    """Expert k of a batch: a head with its lengths, then its arrays in the order of the fields, little endian."""
    c = certificates
    rows, inputs = c.expert_weight.shape[1:]
    floats, octets = c.floats.row(k), c.octets.row(k)
    parts = [_HEAD.pack(c.kind[k], c.cost[k], len(floats), len(octets), inputs, rows)]
    return b"".join([*parts, *(np.ascontiguousarray(part).tobytes() for part in (*_fixed(c, k), floats, octets))])


def unpack(records: Sequence[bytes], inputs: int, rows: int) -> Certificates:
    """The experts of some records, in their order.

    Raises:
        LibraryError: a record that is not one of an expert with that many observations and rows.
    """
    if not records:
        return Certificates.none(inputs, rows)
    return Certificates.join([_unpacked(record, inputs, rows) for record in records])


def _fixed(c: Certificates, k: int) -> list[np.ndarray]:
    return [getattr(c, name)[k] for name in _arrays(c)]


def _arrays(c: Certificates) -> list[str]:
    ragged = [f.name for f in fields(c) if isinstance(getattr(c, f.name), Ragged)]
    return [f.name for f in fields(c) if f.name not in ("kind", "cost", *ragged)]


def _unpacked(record: bytes, inputs: int, rows: int) -> Certificates:
    blank = Certificates.none(inputs, rows)
    if len(record) < _HEAD.size:
        raise LibraryError(f"expert record of {len(record)} bytes: too short to be one")
    kind, cost, floats, octets, n, r = _HEAD.unpack_from(record)
    if (n, r) != (inputs, rows) or kind >= len(KINDS):
        raise LibraryError(
            f"expert record of kind {kind} with {n} observations and {r} rows; {inputs} and {rows} are expected here, "
            f"and kinds below {len(KINDS)} are known"
        )
    sizes = {name: getattr(blank, name).shape[1:] for name in _arrays(blank)}
    types = {name: getattr(blank, name).dtype for name in sizes}
    expected = sum(int(np.prod(shape)) * types[name].itemsize for name, shape in sizes.items()) + 4 * floats + octets
    if len(record) != _HEAD.size + expected:
        raise LibraryError(f"expert record of {len(record)} bytes: {_HEAD.size + expected} are expected")
    position, values = _HEAD.size, {}
    for name, shape in sizes.items():
        count = int(np.prod(shape))
        values[name] = np.frombuffer(record, types[name], count, position).reshape(1, *shape)
        position += count * types[name].itemsize
    return Certificates(
        **values,
        kind=np.array([kind], np.uint8),
        cost=np.array([cost]),
        floats=Ragged.of([np.frombuffer(record, np.float32, floats, position)], np.float32),
        octets=Ragged.of([np.frombuffer(record, np.uint8, octets, position + 4 * floats)], np.uint8),
    )
