"""Takeovers as items: an operator's corrections on one robot keep every robot's library from answering there.

A takeover travels as what its file says (runtime.takeovers) without releases, which are tombstones, and is called
ROBOT.ID in the fleet. What comes from elsewhere is read value by value and written anew: the controller reads these
files while it starts, and nothing that somebody else wrote may stop it.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from laws_ros.core import durable
from laws_ros.core.card import Card
from laws_ros.core.errors import FleetError
from laws_ros.runtime import takeovers
from laws_ros.runtime.takeovers import TAKEOVERS

from .items import Items, tombstone

ROBOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")  # robots' names
_NEW = os.O_CREAT | os.O_EXCL
_NAME = re.compile(rf"({ROBOT.pattern})\.[0-9T]{{8,20}}\.[0-9]{{1,9}}")
MOST_VOLUMES = 1000  # from elsewhere, in force: the control loop tests them one after the other
BY_FLEET = "fleet: "  # how reasons for releases begin that were not made here


def author(name: str) -> str:
    """The robot whose operator took over; "" for what is no takeover's name."""
    found = _NAME.fullmatch(name)
    return found[1] if found else ""


def may_tell(robot: str, items: Items) -> tuple[Items, list[str]]:
    """What a robot may say of some items, and the names of the others: it speaks for no other robot.

    It may tell experts (which are proved), its own takeovers, and withdraw experts, which makes libraries answer less,
    or its own takeovers.
    """

    def may(stone: dict[str, str]) -> bool:
        takeover = author(stone["of"])
        return stone["by"] == robot and (len(stone["of"]) == 16 if not takeover else takeover == robot)

    own = Items(
        items.experts,
        {name: log for name, log in items.takeovers.items() if author(name) == robot},
        {name: stone for name, stone in items.tombstones.items() if may(json.loads(stone))},
    )
    rest = items - own
    return own, sorted(rest.takeovers.keys() | rest.tombstones.keys())


def told(folder: Path, robot: str) -> dict[str, bytes]:
    """All takeovers in a folder of state that are over, by their names in the fleet.

    Args:
        robot: whose folder it is; its own takeovers have no robot's name in theirs.
    """
    found = {}
    for path in sorted((folder / TAKEOVERS).glob("*.jsonl")):
        log = takeovers.lines(path)
        if log and _over(path, log):
            name = path.stem if author(path.stem) else f"{robot}.{path.stem}"
            rows = [{**log[0], "takeover": name}, *(line for line in log[1:] if "released" not in line)]
            found[name] = json.dumps(rows, separators=(",", ":")).encode()
    return found


def released(folder: Path, robot: str) -> dict[str, str]:
    """Takeovers of this robot's own that somebody released here, by their names in the fleet, and why."""
    found = {}
    for path in sorted((folder / TAKEOVERS).glob("*.jsonl")):
        reason = _release(takeovers.lines(path))
        if reason and not reason.startswith(BY_FLEET) and not author(path.stem):
            found[f"{robot}.{path.stem}"] = reason
    return found


def check(name: str, data: bytes, card: Card, policy_sha256: str) -> list[dict[str, Any]]:
    """The lines of a takeover from elsewhere, made of nothing but values that were looked at.

    Raises:
        FleetError: it is not one of this policy and card.
    """
    n, m = len(card.observations), len(card.actions) if card.decision == "none" else 1
    names = [c.name for c in card.observations]

    def numbers(values: Any, count: int | None) -> list[float]:
        found = [float(value) for value in values]
        if (count is not None and len(found) != count) or not all(map(math.isfinite, found)):
            raise ValueError(f"{len(found)} numbers, or one that is not finite, where {count} are expected")
        return found

    def box(text: Any) -> str:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f8")
        if len(values) != n + n * n + 1 or not np.isfinite(values).all() or values[-1] not in range(n + 1):
            raise ValueError("a region that is none of this card's")
        return base64.b64encode(values.tobytes()).decode()

    try:
        head, *rest = json.loads(data)
        if author(name) == "" or head["takeover"] != name:
            raise ValueError("it has another name")
        if (head["card"], head["policy_sha256"]) != (card.digest, policy_sha256) or head["observations"] != names:
            raise ValueError("made with another policy or card")
        lines: list[dict[str, Any]] = [
            {
                **{"takeover": name, "robot": str(head["robot"])[:200], "began": numbers([head["began"]], 1)[0]},
                **{"policy_sha256": policy_sha256, "card": card.digest, "observations": names},
                "actions": [c.name for c in card.actions] if card.decision == "none" else [card.decision],
            }
        ]
        for row in rest:
            if "x" in row:
                told = {
                    "t": numbers([row["t"]], 1)[0],
                    "x": numbers(row["x"], n),
                    "operator": numbers(row["operator"], m),
                }
                command = numbers(row["command"], len(lines[1]["command"]) if len(lines) > 1 else None)
                regions = {str(key)[:64]: box(value) for key, value in row["regions"].items()}
                lines.append({**told, "command": command, "regions": regions})
            elif "ended" in row:
                policy = [numbers(y, m) for y in row["policy"]]
                lines.append({"ended": numbers([row["ended"]], 1)[0], "policy": policy})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FleetError(f"takeover {name[:80]!r}: {error}") from None
    return lines


def volumes(folder: Path) -> int:
    """How many volumes from elsewhere are in force."""
    logs = (takeovers.lines(path) for path in (folder / TAKEOVERS).glob("*.jsonl") if author(path.stem))
    return sum(_volumes(log) for log in logs if not _release(log))


def accept(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    """Write a checked takeover into a folder of state, over a shorter one of the same name.

    Raises:
        FleetError: too many volumes are in force.
    """
    if volumes(folder) + _volumes(lines) > MOST_VOLUMES:
        raise FleetError(f"takeover {name}: more than {MOST_VOLUMES} volumes would be in force; release some")
    _write(folder / TAKEOVERS / f"{name}.jsonl", lines)


def settle(folder: Path, robot: str, out: dict[str, str]) -> int:
    """Release the takeovers that the fleet has withdrawn, and put back those given back; how many changed."""
    changed = 0
    for path in sorted((folder / TAKEOVERS).glob("*.jsonl")):
        log = takeovers.lines(path)
        reason = _release(log)
        name = path.stem if author(path.stem) else f"{robot}.{path.stem}"
        withdrawn, own = out.get(name), next(iter(tombstone(name, reason, robot).tombstones))
        if withdrawn is not None and not reason:
            takeovers.append(path, [{"released": time.time(), "reason": f"{BY_FLEET}{withdrawn}"}])
        elif withdrawn is None and reason and (reason.startswith(BY_FLEET) or own in out):
            _write(path, [line for line in log if "released" not in line])
        else:
            continue
        changed += 1
    return changed


def _over(path: Path, log: list[dict[str, Any]]) -> bool:
    """It has ended, or the process that wrote it did: for an hour nothing was added."""
    return any("ended" in line for line in log) or time.time() - path.stat().st_mtime > 3600.0


def _release(log: list[dict[str, Any]]) -> str:
    return next((str(line["reason"]) or "released" for line in reversed(log) if "released" in line), "")


def _volumes(log: list[dict[str, Any]]) -> int:
    return len({region for line in log for region in line.get("regions", ())})


def _write(path: Path, log: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    takeovers.append(temporary, log, _NEW)
    temporary.replace(path)
    durable.synchronise(path.parent)
