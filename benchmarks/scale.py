"""What grows in a large fleet, and how: a simulation of docs/scale.md, seconds to run.

    python benchmarks/scale.py

Situations are what one expert answers. Their rates are spread evenly over all magnitudes, so many per factor e, which
is the growth O(log N) that arXiv:2605.04069 claims, and what `benchmarks/fleet.py day` measures gives their number.
Every robot meets each of them at random at its rate. What it meets and its library does not answer, it certifies
itself, or only tells; the desk publishes once an interval. So several robots that meet the same new situation within
one interval make an expert each, which are not the same to the byte: those are what a large fleet pays for.

Sizes and times of signed metadata are measured here, on as many keys as there are robots; bytes and seconds per expert
come from benchmarks/fleet.py and are arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from laws_ros.fleet.desk import SHARING
from laws_ros.fleet.desk import receipts as receipt_files

DECADES = 14.0  # of rates, below the largest one, in factors of e times ten


def situations(per_e: float, known: float) -> np.ndarray:
    """[S]: rates per observation of situations that a library from `known` observations does not answer yet.

    It has met those of rate 1 / known and above, more or less: so has a fleet's, as far as it has got.
    """
    count = math.ceil(per_e * DECADES * math.log(10.0))
    rates = np.exp(-(np.arange(count) + 0.5) / per_e)  # the largest is 1
    rng = np.random.default_rng(0)
    return np.asarray(rates[rng.random(count) < np.exp(-rates * known)])


def fleet(robots: int, options: argparse.Namespace, interval: float, learners: bool) -> tuple[Any, ...]:
    """Some days of a fleet, as a row of the table."""
    rng = np.random.default_rng(1)
    waiting = situations(options.per_e, options.known)
    publications = round(24.0 / interval)  # a day
    observations = options.hours * 3600.0 * options.rate / publications  # of a robot between two of them
    found, told = (np.zeros(options.days) for _ in range(2))
    for day in range(options.days):
        for _ in range(publications):
            met = rng.binomial(robots, -np.expm1(-waiting * observations))  # robots that meet each
            found[day] += (met > 0).sum()
            told[day] += met.sum()
            waiting = waiting[met == 0]
    new = told if learners else found
    tell = options.bytes if learners else options.misses * options.miss_bytes  # an expert, or what one is made of
    work = options.proof if learners else options.lesson
    return (
        f"{robots:,}",
        f"{interval:g} h",
        f"{new[0]:,.0f}",
        f"{options.experts + new.sum():,.0f}",
        f"{new[0] * options.bytes / 1e6:,.1f} MB",
        f"{new[-1] * options.bytes / 1e3:,.1f} KB",
        f"{told[0] / robots * tell / 1e3:,.0f} KB",
        f"{new[0] * work / 3600:,.1f} h",
        f"{new[0] * options.proof / 3600:,.1f} h",
    )


def metadata(robots: int) -> tuple[Any, ...]:
    """What signing and reading the robots' keys takes, with keys of the real size, as a row of the table."""
    targets, kind = Targets(delegations=Delegations({}, {})), CryptoSigner.generate_ed25519().public_key
    assert targets.delegations is not None and targets.delegations.roles is not None
    for k in range(robots):
        name, key = f"robot-{k:06}", type(kind)(f"{k:064x}", kind.keytype, kind.scheme, kind.keyval)
        targets.delegations.roles[name] = DelegatedRole(name, [key.keyid], 1, True, paths=[f"robots/{name}/*"])
        targets.delegations.keys[key.keyid] = key
    began = time.perf_counter()
    signed = Metadata(targets)
    signed.sign(CryptoSigner.generate_ed25519())
    data = signed.to_bytes()
    written = time.perf_counter()
    Metadata[Targets].from_bytes(data)
    manifest = {"receipts": math.ceil(robots / SHARING)}
    receipts = min(robots, SHARING) * len(json.dumps({"robot-000000": [1, "0" * 64]}))  # in the file of one robot
    files = Targets(targets={name: TargetFile.from_data(name, bytes(receipts)) for name in receipt_files(manifest)})
    listed = len(Metadata(files).to_bytes()) - len(Metadata(Targets()).to_bytes())
    return (
        f"{robots:,}",
        f"{len(data) / 1e3:,.0f} KB",
        f"{1e3 * (written - began):,.0f} ms",
        f"{1e3 * (time.perf_counter() - written):,.0f} ms",
        f"{receipts / 1e3:,.0f} KB",
        f"{listed / 1e3:,.1f} KB",
    )


def table(head: str, rows: list[tuple[Any, ...]]) -> None:
    print(f"| {head} |\n|{' --- |' * (head.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robots", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--hours", type=float, default=16.0, help="of operation a day")
    parser.add_argument("--rate", type=float, default=50.0, help="observations a second")
    parser.add_argument("--interval", type=float, nargs="+", default=[24.0, 1.0], help="hours between publications")
    parser.add_argument("--known", type=float, default=1e5, help="observations that the first library was made of")
    parser.add_argument("--experts", type=int, default=571, help="that it has")
    parser.add_argument("--per-e", type=float, default=300.0, help="new ones per factor e of observations")
    parser.add_argument("--bytes", type=float, default=1700.0, help="of an expert, sent with others")
    parser.add_argument("--misses", type=float, default=4.0, help="observations that are missed per new expert")
    parser.add_argument("--miss-bytes", type=float, default=70.0, help="of one, sent with others")
    parser.add_argument("--proof", type=float, default=0.15, help="seconds to prove an expert again")
    parser.add_argument("--lesson", type=float, default=0.2, help="seconds of the desk to make one from observations")
    options = parser.parse_args()
    head = "robots | published every | new on the first day | experts after all days | a robot reads, first day | "
    head += "last day | and tells, first day | the desk works, first day | a robot proves, first day"
    for learners in (True, False):
        print("Robots certify:\n" if learners else "The desk certifies:\n")
        rows = [(count, interval) for interval in options.interval for count in options.robots]
        table(head, [fleet(count, options, interval, learners) for count, interval in rows])
    table(
        "robots | their keys | to sign | to read | a file of receipts | the list of these files",
        [metadata(count) for count in options.robots],
    )


if __name__ == "__main__":
    main()
