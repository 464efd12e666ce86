"""`laws fleet ...`: its arguments, and what each action answers. tuf and fsspec are imported by the actions only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laws_ros.core.errors import ConfigError, FleetError

if TYPE_CHECKING:
    from .desk import Desk
    from .robot import Robot

Progress = Callable[[str], None]
Result = tuple[dict[str, Any], str]


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, run: Callable[..., Result], about: str, folder: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=about, description=about)
        sub.set_defaults(act=run)
        sub.add_argument("folder", type=Path, help=folder)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
        return sub

    desk, robot, either = "the desk's folder", "the robot's folder of state", "the desk's or a robot's folder"

    def keys(of: argparse.ArgumentParser) -> None:
        of.add_argument(
            "--keys", action="append", default=[], metavar="DIR", help="folder of further private keys (repeatable)"
        )

    a = action("init", _init, "make a fleet for one policy: keys, signed metadata, and its desk", desk)
    a.add_argument("--store", required=True, help="a folder, or any address that fsspec reaches (s3://, https://, ...)")
    a.add_argument("--policy", required=True, help="the policy, an ONNX file")
    a.add_argument("--tolerance", required=True, help="action error of the fleet's library, as for `laws build`")
    a.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="ROLE=M/N",
        help="M signatures of N keys for root, targets, robots, snapshot or timestamp (default 1/1; repeatable)",
    )
    a.add_argument(
        "--days",
        action="append",
        default=[],
        metavar="ROLE=DAYS",
        help="until a role's metadata expires (default: root 365, targets and robots 90, snapshot 14, timestamp 2)",
    )

    a = action("join", _join, "make a robot's folder of state a member of a fleet", robot)
    a.add_argument("--name", required=True, help="of the robot in the fleet")
    a.add_argument("--store", required=True, help="as for init")
    a.add_argument("--policy", required=True, help="the policy that runs on the robot")
    a.add_argument("--root", required=True, help="the fleet's root.json, as the desk has it, from a trusted source")

    a = action("keys", _keys, "list keys; enrol and revoke robots; replace a key", desk)
    a.add_argument(
        "--enrol", action="append", default=[], metavar="FILE", help="a robot's fleet/robot.pub.json (repeatable)"
    )
    a.add_argument("--revoke", metavar="NAME", help="a robot that may upload no more")
    a.add_argument("--rotate", metavar="ROLE", help="replace a key of this role by a new one")
    a.add_argument("--lost", default="", metavar="ID", help="rotate: the key to replace (default: the role's first)")
    keys(a)

    a = action("publish", _publish, "prove and merge what robots uploaded, and publish what is new, signed", desk)
    a.add_argument("--library", help="also a library that was built here")
    a.add_argument("--learn", action="store_true", help="also certify regions around what robots missed")
    a.add_argument("--no-collect", action="store_true", help="leave uploads alone")
    keys(a)

    action("push", _push, "tell the fleet what this robot learnt, missed and was corrected in", robot)
    action("pull", _pull, "take in what the fleet has signed, prove it again, and serve it", robot)
    action("status", _status, "where a robot or the desk stands; rolls back a snapshot that does not work", either)

    a = action("quarantine", _quarantine, "withdraw an expert from the whole fleet, or give back what was", either)
    a.add_argument("item", help="id of an expert, a takeover (ROBOT.ID), or with --lift a withdrawal")
    a.add_argument("--reason", default="", help="for those who ask later")
    a.add_argument("--lift", action="store_true", help="give back what a withdrawal took")


def run(options: argparse.Namespace, progress: Progress, learn: Callable[[Desk], int]) -> Result:
    """Do what was asked.

    Args:
        learn: certifies experts around what the desk's history holds of misses; returns how many.
    """
    options.folder = options.folder.expanduser()
    options.progress, options.learner = progress, learn
    found: Result = options.act(options)
    return found


def _pairs(texts: list[str], what: str, value: Callable[[str], Any]) -> dict[str, Any]:
    from .trust import ROLES

    found = {}
    for text in texts:
        role, _, rest = text.partition("=")
        try:
            if role not in ROLES:
                raise ValueError(role)
            found[role] = value(rest)
        except (ValueError, TypeError):
            raise ConfigError(f"--{what} {text!r}: ROLE=VALUE with a role of {', '.join(ROLES)} is needed") from None
    return found


def _of(text: str) -> tuple[int, int]:
    needed, _, count = text.partition("/")
    return int(needed), int(count)


def _days(text: str) -> float:
    days = float(text)
    if not 0.0 < days < 36500.0:
        raise ValueError(text)
    return days


def _init(options: argparse.Namespace) -> Result:
    from .desk import Desk

    desk = Desk.create(
        options.folder,
        options.store,
        options.policy,
        options.tolerance,
        _pairs(options.threshold, "threshold", _of),
        _pairs(options.days, "days", _days),
    )
    sent = desk.repository.send(desk.store)
    root = options.folder / "fleet" / "metadata" / "1.root.json"
    keys = sorted(str(path) for path in (options.folder / "keys").glob("*/*.pem"))
    text = (
        f"a fleet for {desk.place.policy.card.name} at {options.store}\n"
        f"robots join with {root}\n"
        f"{len(keys)} private keys in {options.folder / 'keys'}: take those of root away, to where nobody can read them"
    )
    return {"root": str(root), "keys": keys, "store": options.store, "bytes": sent}, text


def _join(options: argparse.Namespace) -> Result:
    from .robot import Robot

    robot = Robot.join(options.folder, options.name, options.store, options.policy, options.root)
    public = robot.fleet / "robot.pub.json"
    text = f"{robot.name} may pull; to let it push, on the desk: laws fleet keys DESK --enrol {public}"
    return {"robot": robot.name, "public_key": str(public)}, text


def _keys(options: argparse.Namespace) -> Result:
    from .desk import Desk
    from .trust import ROLES, read_public

    desk = Desk(options.folder, options.keys)
    repository = desk.repository
    done = ""
    with desk.place.alone():
        if options.rotate is not None:
            if options.rotate not in ROLES:
                raise ConfigError(f"--rotate {options.rotate}: one of {', '.join(ROLES)} is needed")
            folder = options.folder / "keys" / options.rotate
            done = f"new key {repository.rotate(options.rotate, folder, options.lost)[:12]} for {options.rotate}\n"
        if options.revoke is not None:
            repository.revoke(options.revoke)
            done += f"{options.revoke} may upload no more\n"
        if options.enrol:
            new = dict(read_public(Path(path)) for path in options.enrol)
            repository.enrol(new)
            done += f"{', '.join(new)} may upload\n"
        if done:
            repository.send(desk.store)
    roles, lines = {}, []
    for role, found in repository.roles().items():
        keys = {keyid: keyid in repository.signers for keyid in found.keyids}
        roles[role] = {"threshold": found.threshold, "keys": keys}
        names = ", ".join(keyid[:12] + ("" if here else " (not here)") for keyid, here in keys.items())
        lines.append(f"{role:10} {found.threshold} of {len(keys)}: {names}")
    return {"roles": roles, "robots": repository.robots()}, done + "\n".join(
        [*lines, f"robots     {', '.join(repository.robots()) or 'none'}"]
    )


def _publish(options: argparse.Namespace) -> Result:
    from laws_ros.core.library import Library

    from .desk import Desk

    desk = Desk(options.folder, options.keys)
    if options.library:
        desk.add(Library.load(options.library))
    collected = {} if options.no_collect else desk.collect(options.progress)
    learnt = options.learner(desk) if options.learn else 0
    found = desk.publish()
    lines = []
    for name, merged in collected.items():
        lines.append(f"{name}: {_merged(merged)}")
        lines += [f"{name}: refused {what[:60]}: {why}" for what, why in merged.refused.items()]
    lines.append(
        f"publication {found['sequence']}: {found['experts']} new experts, {found['events']} events, {found['chunks']} "
        f"chunks, {found['bytes']} bytes sent"
    )
    told = {name: vars(merged) for name, merged in collected.items()}
    return {**found, "learnt": learnt, "collected": told}, "\n".join(lines)


def _merged(merged: Any) -> str:
    return (
        f"{merged.accepted} experts proved and taken in, {merged.takeovers} takeovers, "
        f"{merged.tombstones} withdrawals, {len(merged.refused)} refused"
    )


def _push(options: argparse.Namespace) -> Result:
    from .robot import Robot

    found = Robot(options.folder).push()
    dropped = ", ".join(f"{count} {what}" for what, count in found["dropped"].items() if count)
    return found, (
        f"{found['sent']} chunks sent, {found['bytes']} bytes; {found['waiting']} wait for the desk"
        + (f"; dropped so far: {dropped}" if dropped else "")
    )


def _pull(options: argparse.Namespace) -> Result:
    from .robot import Robot

    found = Robot(options.folder).pull(options.progress)
    lines = [f"rolled back: {found.healed}"] if found.healed else []
    lines += [f"publication {found.sequence}: {_merged(found.merged)}; {found.bytes} bytes read"]
    lines += [f"refused {what[:60]}: {why}" for what, why in found.merged.refused.items()]
    lines += ["a new snapshot is in use" if found.switched else "the snapshot in use has all of it"]
    told = vars(found.merged)
    return {**{k: v for k, v in vars(found).items() if k != "merged"}, **told}, "\n".join(lines)


def _member(folder: Path, keys: list[str] | None = None) -> Desk | Robot:
    if (folder / "fleet" / "robot.json").is_file():
        from .robot import Robot

        return Robot(folder)
    if (folder / "fleet" / "desk.json").is_file():
        from .desk import Desk

        return Desk(folder, tuple(keys or ()))
    raise FleetError(f"{folder}: is of no fleet; `laws fleet init` makes one, `laws fleet join` a member")


def _status(options: argparse.Namespace) -> Result:
    found = _member(options.folder).status()
    return found, "\n".join(f"{key.replace('_', ' '):16} {value}" for key, value in found.items())


def _quarantine(options: argparse.Namespace) -> Result:
    member = _member(options.folder)
    item = member.place.find(options.item, options.lift)
    stone = member.withdraw(item, options.reason or ("given back" if options.lift else "withdrawn by hand"))
    what = "given back" if options.lift else "withdrawn"
    how = f"; `laws fleet quarantine {options.folder} {stone[:12]} --lift` undoes it" if not options.lift else ""
    return {"item": item, "tombstone": stone}, f"{item} is {what} here, and in the fleet with what is told next{how}"
