"""The card of a policy: its observations and actions in order, with names, units and ranges.

A library is bound to the digest of the card that it was built with, so a reordered joint list, another unit or another
range is noticed before anything moves.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CardError, ObservationError

DECISIONS = ("none", "argmax", "argmin")


@dataclass(frozen=True)
class Channel:
    """One entry of the observation or action vector."""

    name: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Card:
    """What a policy's input and output vectors mean.

    Attributes:
        observations: the observation vector, in order.
        actions: the action vector, in order; for a decision, one channel per alternative.
        decision: "none" (a continuous action), "argmax" or "argmin" (the index of the best output is the action).
        context: names of observations that are discrete (task, station, mode); they are the first symbols of a key.
    """

    name: str
    observations: tuple[Channel, ...]
    actions: tuple[Channel, ...]
    decision: str = "none"
    context: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over everything on the card except its name."""
        record = asdict(self)
        del record["name"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    @property
    def low(self) -> NDArray[np.float64]:
        return np.array([c.low for c in self.observations])

    @property
    def high(self) -> NDArray[np.float64]:
        return np.array([c.high for c in self.observations])

    @property
    def action_range(self) -> NDArray[np.float64]:
        """Width of every action's range [m], infinite where the card gives no limits."""
        return np.array([c.high - c.low for c in self.actions])

    @property
    def limits(self) -> NDArray[np.float32]:
        """[2, m]: the least and the greatest value of every action; infinite where the card gives none."""
        return np.array([[c.low for c in self.actions], [c.high for c in self.actions]], np.float32)

    @property
    def context_indices(self) -> tuple[int, ...]:
        names = [c.name for c in self.observations]
        return tuple(names.index(name) for name in self.context)

    def check(self, observation: NDArray[Any]) -> None:
        """Raise ObservationError unless the observation has this card's length, is finite and lies in range."""
        if observation.shape != (len(self.observations),):
            raise ObservationError(
                f"observation has shape {observation.shape}, card {self.name} has {len(self.observations)} entries"
            )
        for channel, value in zip(self.observations, observation, strict=True):
            if not channel.low <= value <= channel.high:  # false for a NaN too
                kind = "not a number" if math.isnan(value) else f"outside [{channel.low:g}, {channel.high:g}]"
                raise ObservationError(
                    f"observation {channel.name} = {value:g} {channel.unit} is {kind}".replace("  ", " ")
                )

    def difference(self, other: Card) -> str:
        """The first thing in which another card differs from this one, for an error message."""
        for kind in ("observations", "actions"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if len(mine) != len(theirs):
                return f"{len(mine)} {kind} against {len(theirs)}"
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                for field in fields(Channel):
                    if getattr(a, field.name) != getattr(b, field.name):
                        return (
                            f"{kind}[{i}].{field.name}: {getattr(a, field.name)!r} against {getattr(b, field.name)!r}"
                        )
        for kind in ("decision", "context"):
            if getattr(self, kind) != getattr(other, kind):
                return f"{kind}: {getattr(self, kind)!r} against {getattr(other, kind)!r}"
        return "no difference"

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` reads; infinite limits are left out (JSON has no infinity)."""

        def channel(c: Channel) -> dict[str, Any]:
            return {k: v for k, v in asdict(c).items() if not (isinstance(v, float) and math.isinf(v))}

        return {
            "name": self.name,
            "observations": [channel(c) for c in self.observations],
            "actions": [channel(c) for c in self.actions],
            "decision": self.decision,
            "context": list(self.context),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Card:
        """Read a card strictly.

        Args:
            data: the mapping read from a YAML card or a library's header.
            where: the file's name, for messages.

        Raises:
            CardError: unknown or missing key, wrong type, empty range, duplicate name, unknown decision or context.
        """
        if not isinstance(data, dict):
            raise CardError(f"{where}: a card is a mapping, found {type(data).__name__}")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise CardError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
        for key in ("observations", "actions"):
            if not isinstance(data.get(key), list) or not data[key]:
                raise CardError(f"{where}: {key}: a list of at least one channel is needed, found {data.get(key)!r}")
        decision = data.get("decision", "none")
        if decision not in DECISIONS:
            raise CardError(f"{where}: decision: {decision!r} is none of {', '.join(DECISIONS)}")
        observations = _channels(data["observations"], f"{where}: observations")
        context = data.get("context") or []
        if not isinstance(context, list):
            raise CardError(f"{where}: context: a list of observation names is needed, found {context!r}")
        for name in context:
            if name not in [c.name for c in observations]:
                raise CardError(f"{where}: context: {name!r} is not one of the observations")
        return cls(
            name=str(data.get("name", where)),
            observations=observations,
            actions=_channels(data["actions"], f"{where}: actions"),
            decision=decision,
            context=tuple(context),
        )

    @classmethod
    def plain(cls, name: str, observations: int, actions: int, decision: str = "none") -> Card:
        """The card of a policy that has none: x0, x1, ... without units or ranges."""
        return cls(
            name,
            tuple(Channel(f"x{i}") for i in range(observations)),
            tuple(Channel(f"y{i}") for i in range(actions)),
            decision,
        )


def _channels(rows: list[Any], where: str) -> tuple[Channel, ...]:
    known = [f.name for f in fields(Channel)]
    channels: list[Channel] = []
    for i, row in enumerate(rows):
        here = f"{where}[{i}]"
        if not isinstance(row, dict):
            raise CardError(f"{here}: a mapping with name, unit, low, high is needed, found {row!r}")
        for key in row:
            if key not in known:
                raise CardError(f"{here}: unknown key {key!r}; known keys: {', '.join(known)}")
        if not isinstance(row.get("name"), str) or not row["name"]:
            raise CardError(f"{here}.name: a name is needed, found {row.get('name')!r}")
        limits = {}
        for key, default in (("low", -math.inf), ("high", math.inf)):
            value = row.get(key, default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise CardError(f"{here}.{key}: a number is needed, found {value!r}")
            limits[key] = float(value)
        if limits["low"] >= limits["high"]:
            raise CardError(f"{here}: low {limits['low']:g} is not below high {limits['high']:g}")
        channels.append(Channel(row["name"], str(row.get("unit", "")), **limits))
    names = [c.name for c in channels]
    for name in names:
        if names.count(name) > 1:
            raise CardError(f"{where}: the name {name!r} stands twice")
    return tuple(channels)
