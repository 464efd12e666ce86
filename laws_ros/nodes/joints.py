"""Between a policy's observation vector and sensor_msgs/JointState: by joint name, whatever a message's order."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.core.errors import CardError, ObservationError

FIELDS = ("position", "velocity", "effort")


class JointBinding:
    """Reads observation vectors out of JointState messages and fills messages from vectors.

    Args:
        channels: the observations of a card, each named "<joint>.position", "<joint>.velocity" or "<joint>.effort".

    Raises:
        CardError: a channel that is named otherwise.
    """

    def __init__(self, channels: tuple[Channel, ...]) -> None:
        self._sources: list[tuple[str, str]] = []
        for i, channel in enumerate(channels):
            joint, _, field = channel.name.rpartition(".")
            if not joint or field not in FIELDS:
                raise CardError(
                    f"observations[{i}] {channel.name!r} cannot be read from a JointState; "
                    f"<joint>.{' or <joint>.'.join(FIELDS)} is needed"
                )
            self._sources.append((joint, field))
        self.joints = list(dict.fromkeys(joint for joint, _ in self._sources))
        self._fields = sorted({field for _, field in self._sources})
        self._order: list[str] | None = None  # the joint names of the last message, to which _indices belong
        self._indices: list[tuple[str, int]] = []

    def read(self, message: Any) -> NDArray[np.float32]:
        """The observation vector [n] in a JointState.

        Raises:
            ObservationError: a joint that is missing or stands twice, or a field without one value per joint.
        """
        names = message.name
        if names != self._order:
            self._order = None
            for joint in self.joints:
                if names.count(joint) != 1:
                    found = "stands twice" if joint in names else "is missing"
                    raise ObservationError(f"joint {joint!r} {found}; the message has {', '.join(names) or 'none'}")
            self._indices = [(field, names.index(joint)) for joint, field in self._sources]
            self._order = list(names)
        for field in self._fields:
            if len(getattr(message, field)) != len(names):
                raise ObservationError(f"{field} has {len(getattr(message, field))} values for {len(names)} joints")
        numbers = array("f", [getattr(message, field)[i] for field, i in self._indices])  # too large becomes infinite
        return np.frombuffer(numbers, np.float32)

    def write(self, message: Any, observation: NDArray[np.float32]) -> None:
        """Fill a JointState from a vector [n]; what a joint's channels do not tell is NaN."""
        message.name = self.joints
        for field in self._fields:
            values = dict.fromkeys(self.joints, float("nan"))
            values.update({j: float(v) for (j, f), v in zip(self._sources, observation, strict=True) if f == field})
            setattr(message, field, list(values.values()))
