"""The `laws` command. Heavy imports stay inside the subcommands; bad input ends in one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laws_ros import __version__
from laws_ros.core.errors import ConfigError, LawsError, LibraryError
from laws_ros.fleet import command as fleet

if TYPE_CHECKING:
    from laws_ros.build.workers import Workers
    from laws_ros.build.workloads import Workload
    from laws_ros.core.library import Library
    from laws_ros.fleet.desk import Desk
    from laws_ros.runtime.policy import Policy

EXTRAS = {
    **{"rclpy": "ros", "mujoco": "sim", "rich": "sim", "gymnasium": "gym", "torch": "train", "scipy": "train"},
    **{"tuf": "fleet", "securesystemslib": "fleet", "cryptography": "fleet", "fsspec": "fleet"},
    **{"rosbags": "sim", "matplotlib": "plot", "PIL": "plot", "OpenGL": "plot", "ray": "cluster"},
}
HELDOUT = 1_000_003  # added to a seed: held-out episodes share nothing with those learned from


def main(arguments: list[str] | None = None) -> int:
    """Run `laws ...`; returns the exit code: 0 success, 1 the command's own check failed, 2 bad input."""
    options = parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except LawsError as error:
        print(f"laws {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        bring = f"pip install 'laws_ros[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"
        print(f"laws {options.command}: the Python package {package} is not installed: {bring}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"laws {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="laws", description="Certified experts in front of a large learned policy.")
    parser.add_argument("--version", action="version", version=f"laws_ros {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return sub

    workload = "cartpole, gym:ENV_ID, a recorded bag, ... (`laws workloads` lists them)"
    parts = (
        "folder for finished episodes: an interrupted run goes on, and machines that share the folder share the work"
    )
    c = command("build", _build, "grow and certify a library over what a workload visits")
    c.add_argument("--policy", required=True, help="the policy, an ONNX file")
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--out", required=True, help="where to write the library")
    c.add_argument(
        "--tolerance",
        default=None,
        help="largest action error: a number in action units, a share of each action's range such as 2.5%%, or one "
        "value per action separated by commas (default: what `laws calibrate` found for the workload, else 2.5%%)",
    )
    c.add_argument("--decision", choices=("none", "argmax", "argmin"), help="how outputs become a discrete action")
    c.add_argument("--max-regions", type=_positive, default=20_000)
    c.add_argument("--steps", type=_positive, default=100_000, help="observations to learn from (default 100000)")
    c.add_argument("--seed", type=_count, default=0)
    c.add_argument("--parts", help=parts)
    c.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="who runs episodes and certifies: this process, or the workers of a Ray cluster (RAY_ADDRESS; else one is "
        "started here); the library is the same",
    )
    c.add_argument(
        "--kind",
        choices=("linear", "point", "lipschitz", "exact", "mixed", "linear+exact", "linear+mixed", "statistical"),
        default="linear",
        help="of certificates (default linear); with a +, the second where the first fails; statistical works for "
        "every policy, but proves nothing: fresh episodes show how often a bound is exceeded",
    )
    c.add_argument(
        "--effort",
        default="split:4",
        help="of the bounds of regions that are kept: interval, forward, backward, optimised, or split:N (default "
        "split:4), on up to N parts of each; all are found with backward, and a dearer effort is given up where it "
        "hardly shrinks the bounds",
    )
    c.add_argument(
        "--share", type=_fraction, default=0.25, help="exact, mixed: of the policy's multiplications, at most (0.25)"
    )
    c.add_argument(
        "--delta",
        type=_fraction,
        default=0.01,
        help="statistical: share of a region's traffic that may exceed its bound",
    )
    c.add_argument(
        "--beta", type=_fraction, default=1e-6, help="statistical: probability that any of the statements is false"
    )
    c.add_argument(
        "--fresh-episodes", type=_positive, help="statistical: to test on (default: as many as delta and beta need)"
    )

    c = command("tighten", _tighten, "certify a library's regions again with a dearer effort; keep what is tighter")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--effort", default="split:4", help="of the bounds, as of `laws build` (default split:4)")
    c.add_argument("--out", required=True, help="where to write the library")

    c = command("verify", _verify, "try to break a library: re-check every certificate, sample, attack")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--samples", type=_count, default=100_000)
    c.add_argument("--attack", action="store_true", help="also climb the error by projected gradient")
    c.add_argument("--workload", help="statistical kinds: measure them on fresh episodes of it")
    c.add_argument("--episodes", type=_positive, default=200, help="of that workload (default 200)")
    c.add_argument("--seed", type=_count, default=0)

    c = command("eval", _eval, "run a workload with the library and with the policy alone")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--episodes", type=_positive, default=10)
    c.add_argument("--tolerance", default=None, help="as for build (default: the library's)")
    c.add_argument("--kinds", default="", help="of certificates that may answer, separated by commas (default: formal)")
    c.add_argument("--seed", type=_count, default=12345)

    c = command("bench", _bench, "compare LAWS with the alternatives on one workload, in one run on this machine")
    c.add_argument("workload", help=workload)
    c.add_argument("--policy", help="default models/WORKLOAD.onnx")
    c.add_argument("--decision", choices=("none", "argmax", "argmin"), help="as for build")
    c.add_argument("--tolerance", default=None, help="as for build")
    c.add_argument("--methods", default="", help="of policy,cache,nearest,student,mixture,router,formula,formal,"
                   "statistical (default: all)")  # fmt: skip
    c.add_argument("--steps", type=_positive, default=100_000, help="observations to learn from (default 100000)")
    c.add_argument("--episodes", type=_positive, default=10, help="held-out ones, driven by each (default 10)")
    c.add_argument("--max-regions", type=_positive, default=20_000)
    c.add_argument("--library", help="a formal one, grown from as much with the same seed (default: one is grown)")
    c.add_argument("--delta", type=_fraction, default=0.05, help="statistical: as for build (default 0.05)")
    c.add_argument("--beta", type=_fraction, default=1e-6, help="statistical: as for build")
    c.add_argument("--fresh-episodes", type=_positive, help="statistical: as for build")
    c.add_argument("--out", help="folder for bench.json, bench.md and bench.svg (default: the table on stdout only)")
    c.add_argument("--seed", type=_count, default=0)

    c = command("explain", _explain, "print a library's laws in sensor names and units")
    c.add_argument("library")
    c.add_argument("--region", help="a region's id (or its first digits) or number; default: the ten most used")
    c.add_argument("--all", action="store_true", help="every region")

    c = command("export-vnnlib", _export_vnnlib, "write a certificate for other verifiers (ONNX and VNN-LIB)")
    c.add_argument("library")
    c.add_argument("--region", required=True, help="a region's id (or its first digits) or number")
    c.add_argument("--out", required=True, help="folder for the difference network and the property")
    c.add_argument("--policy", help="default: the ONNX file beside the library, of its name")

    c = command("report", _report, "write one HTML file about a library, to be read without a network")
    c.add_argument("library")
    c.add_argument("--out", "-o", required=True, help="the HTML file to write")
    c.add_argument("--policy", help="default: the ONNX file beside the library, of its name, if it is there")
    c.add_argument("--workload", help=f"to measure on: {workload}; default: what the library was grown on; none: no")
    c.add_argument("--steps", type=_positive, default=4000, help="of the workload, about (default 4000)")
    c.add_argument("--kinds", default="", help="of certificates that may answer, separated by commas (default: formal)")
    c.add_argument("--history", help="of a learner: also draw how the library grew")
    c.add_argument("--seed", type=_count, default=4 * HELDOUT)

    command("workloads", _workloads, "list the workloads and their parameters")

    c = command("record", _record, "run a policy on a workload and write a rosbag2 bag")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--out", required=True, help="a file that ends in .mcap (or .db3), or a new folder")
    c.add_argument("--episodes", type=_positive, default=10)
    c.add_argument("--seed", type=_count, default=0)
    c.add_argument("--parts", help=parts)

    c = command("calibrate", _calibrate, "find how much action error a task stands")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--episodes", type=_positive, default=32, help="per measurement (default 32)")
    c.add_argument("--keep", type=float, default=0.99, help="share of the return that must remain (default 0.99)")
    c.add_argument("--plot", help="write the curves to this picture")
    c.add_argument("--seed", type=_count, default=0)

    c = command("history-length", _history_length, "measure how much of its past a policy over several frames needs")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=f"{workload}; of whole windows, or of single frames")
    c.add_argument(
        "--frames", type=_positive, help="in the policy's window, the oldest first (default: as many as fit)"
    )
    c.add_argument("--decision", choices=("none", "argmax", "argmin"), help="as for build")
    c.add_argument("--distortion", default=None, help="that a shorter window may cause; as the tolerance for build")
    c.add_argument("--episodes", type=_positive, default=20)
    c.add_argument("--seed", type=_count, default=0)

    c = command("adapt", _adapt, "distil a finished policy into one of the same interface that is cheap to cache")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--out", required=True, help="the ONNX file to write, its card beside it")
    c.add_argument("--decision", choices=("none", "argmax", "argmin"), help="as for build")
    c.add_argument("--tolerance", default=None, help="as for build")
    c.add_argument("--hidden", type=_positive, default=1024, help="width of the two hidden layers (default 1024)")
    c.add_argument("--steps", type=_positive, default=5000, help="of training (default 5000)")
    c.add_argument("--episodes", type=_positive, default=64, help="gathered per round of DAgger (default 64)")
    c.add_argument("--check-episodes", type=_positive, default=200, help="for the returns (default 200)")
    c.add_argument("--max-regions", type=_positive, default=2000, help="of the libraries compared (default 2000)")
    c.add_argument("--seed", type=_count, default=0)

    c = command("render", _render, "draw a contact sheet of one episode, without a screen")
    c.add_argument("workload", help=workload)
    c.add_argument("--policy", required=True)
    c.add_argument("--out", required=True, help="the PNG file to write")
    c.add_argument("--seconds", type=float, help="of the episode (default: all of it)")
    c.add_argument("--seed", type=_count, default=0)

    c = command("train", _train, "train a workload's full policy again")
    c.add_argument("workload")
    c.add_argument("--out", default="models", help="folder for the model, its card and the manifest (default models)")
    c.add_argument(
        "--policy",
        choices=("relu", "diffusion"),
        default="relu",
        help="a network that is cheap to cache (default), or one that no verifier here can bound",
    )
    c.add_argument("--seed", type=_count, default=0)

    c = command("up", _up, "robots under their controllers: simulator and controller nodes, until Ctrl-C")
    c.add_argument("robot", nargs="?", default="cartpole", help="names config/ROBOT.yaml, or a parameters file")
    c.add_argument("--namespace", action="append", help="of a robot; given several times, several robots")
    c.add_argument("--no-sim", action="store_true", help="controllers only: a real robot's drivers are running")
    c.add_argument("--policy", help="instead of the parameters file's")
    c.add_argument("--library", help="instead of the parameters file's")
    c.add_argument(
        "--state", metavar="FOLDER", help="keep what is learnt and what operators corrected here, and start learners"
    )
    c.add_argument("--seconds", type=float, default=0.0, help="end after this long (default: never)")
    c.add_argument("--record", metavar="FOLDER", help="keep a bag of all that the robots say in a new folder")

    c = command("top", _top, "watch the controllers on the network, live")
    c.add_argument("--once", action="store_true", help="print what they say once; exit code 1 if there is none")

    c = command("bundle", _bundle, "write one file with all that a robot needs")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--out", required=True, help="the file to write")
    c.add_argument("--config", help="a parameters file to send along")

    c = command("install", _install, "unpack a bundle on a robot, try it and switch to it in one step")
    c.add_argument("bundle", nargs="?", help="the file that `laws bundle` wrote")
    c.add_argument("--into", required=True, help="folder; `current` in it is what runs")
    c.add_argument("--roll-back", action="store_true", help="switch to the release before instead")

    c = command("doctor", _doctor, "look at this machine: does it keep what certificates assume, and is it fit to run")
    c.add_argument("--policy", help="also try this policy here")
    c.add_argument("--library", help="and this library")
    c.add_argument("--providers", default="", help="of cpu,cuda,tensorrt: the policy runs on the first that loads")

    c = command("library", _library_command, "care for the history that a learner writes")
    c.add_argument(
        "action",
        choices=("recover", "snapshot", "review", "release"),
        help="of a learner's history: save what is intact, or write the library of today; of a robot's folder of "
        "state: list what operators corrected, or let the library answer there again",
    )
    c.add_argument("history", help="the history's file, or the folder of state")
    c.add_argument("--out", help="recover, snapshot: the file to write")
    c.add_argument("--takeover", help="release: which one")
    c.add_argument("--reason", default="reviewed", help="release: what the review found, for those who ask later")

    c = command("fleet", _fleet, "robots that share what they certify, with signed updates")
    fleet.declare(c)

    c = command("demo", _demo, "the main job: simulated robot and controller over ROS 2, checked afterwards")
    c.add_argument("--seconds", type=float, default=30.0, help="simulated operation (default 30)")
    c.add_argument("--policy", help="default models/cartpole.onnx")
    c.add_argument("--library", help="default models/cartpole.laws")
    c.add_argument("--seed", type=_count, default=0)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: at least 0 is needed")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text}: a number between 0 and 1 is needed")
    return value


class _Progress:
    """Lines on stderr for work that takes longer than two seconds, at most one every two seconds."""

    def __init__(self, command: str) -> None:
        self.command, self.start = command, time.monotonic()
        self.last = self.start

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self.last >= 2.0:
            self.last = now
            print(f"laws {self.command} [{now - self.start:5.0f} s] {text}", file=sys.stderr, flush=True)

    def bar(self, share: float, text: str) -> None:
        """How much is done, as a bar; on a terminal it is drawn over the last one."""
        now = time.monotonic()
        if now - self.last < (0.2 if sys.stderr.isatty() and self.last > self.start else 2.0):
            return
        self.last = now
        left = f", {(now - self.start) * (1 - share) / share:.0f} s left" if share else ""
        line = f"laws {self.command} [{'#' * round(30 * share):.<30}] {text}{left}"
        terminal = sys.stderr.isatty()
        print(f"\r{line}\033[K" if terminal else line, file=sys.stderr, flush=True, end="" if terminal else "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _print(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    print(json.dumps(_finite(result)) if options.json else text)


def _open_policy(path: str, decision: str | None = None, threads: int | None = None) -> Policy:
    from laws_ros.runtime.files import resolve
    from laws_ros.runtime.policy import Policy

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Policy(resolve(path), threads or cores or 1, decision)


def parse_tolerance(text: str | None, policy: Policy, workload: Workload | None = None) -> Any:
    """A tolerance per action [m] in action units from the command line's notation (see `laws build --help`).

    Raises:
        ConfigError: not a number, a wrong count, negative, or a share of a range that nobody states.
    """
    import numpy as np

    from laws_ros.runtime.cached_policy import check_tolerance

    if policy.card.decision != "none":
        return np.zeros(0)
    width = policy.card.action_range
    if workload is not None:
        stated = np.array([c.high - c.low for c in workload.spec.actions])
        width = np.where(np.isfinite(width), width, stated)
    calibrated = workload.spec.tolerance if workload is not None else None
    parts = (text or f"{100 * (calibrated or 0.025):.10g}%").split(",")
    if len(parts) not in (1, policy.actions):
        raise ConfigError(f"tolerance {text!r}: {len(parts)} values for {policy.actions} actions; give one or one each")
    values = []
    for k in range(policy.actions):
        part = parts[k if len(parts) > 1 else 0].strip()
        try:
            number = float(part.rstrip("%"))
        except ValueError:
            raise ConfigError(f"tolerance {text!r}: {part!r} is not a number") from None
        if part.endswith("%"):
            if not math.isfinite(width[k]):
                raise ConfigError(
                    f"tolerance {part}: action {policy.card.actions[k].name} of {policy.path} has no limits to take a "
                    "share of; give --tolerance in action units, or limits on the policy's card"
                )
            number *= width[k] / 100.0
        values.append(number)
    return check_tolerance(values, policy)


def _plain(tolerance: Any) -> float | list[float]:
    values = [float(v) for v in tolerance]
    return 0.0 if not values else values[0] if len(set(values)) == 1 else values


def _build(options: argparse.Namespace) -> int:
    from laws_ros.build.workers import hired

    with hired(options.engine) as workers:
        return _built(options, workers)


def _built(options: argparse.Namespace, workers: Workers) -> int:
    import numpy as np

    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit, observed
    from laws_ros.build.grow import grow
    from laws_ros.build.kinds import by_formula, grow_points
    from laws_ros.build.statistical import grow_statistical, trial
    from laws_ros.build.verify import Executed
    from laws_ros.core.bounds import parts_of
    from laws_ros.core.certificate import COLLAPSED, FORMAL
    from laws_ros.runtime.onnx_graph import load_network
    from laws_ros.runtime.routing import Router

    start, progress = time.monotonic(), _Progress("build")
    parts_of(options.effort)
    out = _writable(options.out)
    policy = _open_policy(options.policy, options.decision)
    statistical = options.kind == "statistical"
    first, _, second = options.kind.rpartition("+")
    if second in COLLAPSED and policy.card.decision != "none":
        raise ConfigError(
            f"--kind {options.kind}: collapsed experts cannot decide by {policy.card.decision}; use linear"
        )
    network = None if statistical else load_network(policy.path)
    workload = workloads.get(options.workload, policy)
    check_fit(policy, workload)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    seeds = options.seed, options.seed + HELDOUT
    seen, heldout = observed(policy, workload, options.steps, seeds, parts=_folder(options.parts), workers=workers)
    rolled = time.monotonic()
    progress(
        f"{len(seen.returns)} blocks of {workload.spec.name} read"
        if workload.recorded is not None
        else f"{len(seen.returns)} episodes of {workload.spec.name} run, return {seen.returns.mean():.1f}"
    )
    observations = np.concatenate(seen.observations)
    actions = np.concatenate(seen.actions)
    limits = tolerance, options.max_regions
    if network is None:
        confidence = options.delta, options.beta
        tested = trial(
            policy, workload, *confidence, options.seed + 2 * HELDOUT, options.fresh_episodes,
            parts=_folder(options.parts), workers=workers, progress=progress,
        )  # fmt: skip
        growth = grow_statistical(policy, seen.observations, tested, tolerance, options.max_regions, progress)
    elif options.kind == "point":
        growth = grow_points(policy, network, observations, *limits, progress)
    else:
        base = None
        if first or second in ("linear", "lipschitz"):
            base = growth = grow(
                policy, network, observations, actions, *limits,
                progress=progress, effort=options.effort, workers=workers,
            )  # fmt: skip
        if second == "lipschitz":
            growth = by_formula(policy, network, growth, observations, tolerance)
        elif second != "linear":
            from laws_ros.build.folded import grow_collapsed

            growth = grow_collapsed(
                policy, network, observations, tolerance, second, options.share, options.max_regions,
                progress=progress, base=base,
            )  # fmt: skip
    fresh = np.concatenate(heldout.observations)
    found = Router(growth.library, tolerance, ["statistical"] if statistical else FORMAL).many(fresh)
    hit, hit_rate = found >= 0, float((found >= 0).mean())
    result = {
        "kind": options.kind,
        "effort": options.effort,
        "regions": len(growth.library),
        "certificates_tried": growth.certificates_tried,
        "train_coverage": growth.train_coverage,
        "heldout_hit_rate": hit_rate,
        "tolerance": _plain(tolerance),
        "decision": policy.card.decision,
        "workload": workload.spec.name,
        "seed": options.seed,
        "train_observations": len(observations),
        "heldout_observations": len(fresh),
        "entropy_bits": round(growth.library.entropy, 3),
        "predicted_regions": round(growth.library.predicted(len(observations))),
        "rollout_seconds": round(rolled - start, 2),
    }
    if statistical and hit.any():
        _, error, bound = Executed(policy, growth.library.certificates).compare(found[hit], fresh[hit], delivered=True)
        result |= {
            "delta": options.delta,
            "beta": options.beta,
            "fresh_episodes": tested.episodes,
            "heldout_exceedance": float((~(error <= bound).all(axis=1)).mean()),
        }
    library = replace(growth.library, notes=_finite(result))
    library.save(out)
    result |= {"seconds": round(time.monotonic() - start, 2), "library": str(out), "bytes": out.stat().st_size}
    _print(
        options,
        result,
        (
            f"{out}: {len(library)} regions ({result['bytes'] / 1e6:.1f} MB) from {len(observations)} observations, "
            f"{result['certificates_tried']} certificates tried, {result['seconds']} s\n"
            f"answered within {_tolerance_text(policy, tolerance)}: {100 * growth.train_coverage:.2f}% of the training "
            f"observations, {100 * hit_rate:.2f}% of {len(fresh)} held-out ones"
            + (f"; {result['heldout_exceedance']:.3%} of these beyond their bound" if "delta" in result else "")
        ),
    )
    return 0


def _tighten(options: argparse.Namespace) -> int:
    import numpy as np

    from laws_ros.build.grow import tighten
    from laws_ros.runtime.cached_policy import open_pair
    from laws_ros.runtime.files import resolve
    from laws_ros.runtime.onnx_graph import load_network

    out = _writable(options.out)
    library, policy = open_pair(resolve(options.library), resolve(options.policy), os.cpu_count() or 1)
    found, tried = tighten(library, load_network(policy.path), options.effort, _Progress("tighten"))
    shrunk = (found.certificates.worst / library.certificates.worst).max(axis=1)
    found = replace(found, notes=found.notes | {"effort": options.effort})
    found.save(out)
    result = {
        "regions": len(found),
        "certificates_tried": tried,
        "tighter": int((shrunk < 1.0).sum()),
        "median_bound_over_old": float(np.median(shrunk)) if len(shrunk) else None,
        "library": str(out),
    }
    text = f"{out}: {result['tighter']} of {len(found)} bounds are tighter"
    _print(options, result, text + (f", the median is {np.median(shrunk):.2f} of what it was" if len(shrunk) else ""))
    return 0


def _tolerance_text(policy: Policy, tolerance: Any) -> str:
    if policy.card.decision != "none":
        return f"the policy's own {policy.card.decision}"
    return ", ".join(f"{v:g} {c.unit}".strip() for v, c in zip(tolerance, policy.card.actions, strict=True))


def _verify(options: argparse.Namespace) -> int:
    import numpy as np

    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit, policy_rollouts
    from laws_ros.build.verify import verify
    from laws_ros.core.certificate import FORMAL
    from laws_ros.runtime.cached_policy import open_pair
    from laws_ros.runtime.files import resolve
    from laws_ros.runtime.onnx_graph import load_network

    start, progress, fresh = time.monotonic(), _Progress("verify"), []
    library, policy = open_pair(resolve(options.library), resolve(options.policy), os.cpu_count() or 1)
    network = load_network(policy.path) if library.certificates.among(FORMAL).any() else None
    if options.workload is not None:
        workload = workloads.get(options.workload, policy)
        check_fit(policy, workload)
        rolled = policy_rollouts(policy, workload, options.episodes, options.seed + 3 * HELDOUT)
        fresh = rolled.observations
    found = verify(library, policy, network, options.samples, options.attack, options.seed, progress, fresh)
    ratio = found.ratio[~np.isnan(found.ratio)]
    result = {
        "certificates": len(library),
        "rechecked": found.rechecked,
        "unknown": found.unknown,
        "kinds": found.by_kind,
        "samples": found.samples,
        "attacks": found.attacks,
        "violations": found.violations,
        "first_violation": found.first,
        "median_bound_over_worst_seen": float(np.median(ratio)) if len(ratio) else None,
        "fresh_observations": found.fresh,
        "exceedances": found.exceedances,
        "seconds": round(time.monotonic() - start, 2),
    }
    text = ""
    for kind, verdicts in found.by_kind.items():
        how = "the arithmetic of the record" if kind == "statistical" else "proved again by the checker"
        text += f"{kind}: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())} ({how})\n"
    if network is not None:
        text += (
            f"{found.samples} samples and {found.attacks} attacks through ONNX Runtime (float32): "
            f"{found.violations} violations\n"
        )
    if len(ratio):
        text += f"certified bound over worst error seen: median {np.median(ratio):.2f}\n"
    text += _exceedances_text(found.exceedances, found.fresh)
    if found.first:
        text += f"first violation: {found.first}\n"
    _print(options, result, text + ("every bound held" if found.good else "NOT every bound could be shown to hold"))
    return 0 if found.good else 1


def _exceedances_text(exceedances: int, answers: int) -> str:
    if not answers:
        return ""
    return (
        f"statistical: {exceedances} of {answers} fresh observations beyond their bound ({exceedances / answers:.3%})\n"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _eval(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit, evaluate
    from laws_ros.runtime.cached_policy import CachedPolicy, open_pair
    from laws_ros.runtime.files import resolve

    library, policy = open_pair(resolve(options.library), resolve(options.policy))
    workload = workloads.get(options.workload, policy)
    check_fit(policy, workload)
    tolerance = parse_tolerance(options.tolerance, policy, workload) if options.tolerance else None
    cached = CachedPolicy(library, policy, tolerance, _names(options.kinds))
    found = evaluate(cached, workload, options.episodes, options.seed, _Progress("eval"))
    result = asdict(found) | {
        "episodes": options.episodes,
        "tolerance": _plain(cached.tolerance),
        "kinds": list(cached.kinds),
    }
    _print(
        options,
        result,
        (
            f"{found.steps} steps, {100 * found.hit_rate:.2f}% answered by the library within "
            f"{_tolerance_text(policy, cached.tolerance)}\n"
            f"{_returns_text(found.return_cached, found.return_policy)}\n"
            f"worst error over its bound: {found.worst_error_over_bound:.3f}, {found.violations} violations\n"
            f"{_exceedances_text(found.exceedances, found.statistical_hits)}"
            f"hit p50 {found.hit_us['p50']:.1f} us, p99 {found.hit_us['p99']:.1f} us; policy p50 "
            f"{found.policy_us['p50']:.1f} us, p99 {found.policy_us['p99']:.1f} us; mean step "
            f"{found.mean_step_us:.1f} us, {found.mean_step_speedup:.1f} times cheaper than the policy alone"
        ),
    )
    return 0 if found.violations == 0 else 1


def _bench(options: argparse.Namespace) -> int:
    from laws_ros.build import bench, workloads
    from laws_ros.build.evaluate import check_fit
    from laws_ros.core.library import Library
    from laws_ros.runtime.files import resolve

    out = Path(options.out).expanduser() if options.out else None
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be made a folder: {error.strerror}") from None
    base = options.workload.partition("?")[0]
    policy = _open_policy(options.policy or f"models/{base}.onnx", options.decision, threads=1)
    workload = workloads.get(options.workload, policy)
    check_fit(policy, workload)
    numbers = {"steps", "episodes", "seed", "max_regions", "fresh_episodes", "delta", "beta"}
    library = None
    if options.library:
        library = Library.load(resolve(options.library))
        library.check_policy(policy.sha256, policy.card, options.library, str(policy.path))
    found = bench.bench(
        policy,
        workload,
        parse_tolerance(options.tolerance, policy, workload),
        bench.Budget(library=library, **{name: getattr(options, name) for name in numbers}),
        _names(options.methods),
        _Progress("bench"),
    )
    result, text = _finite(found.record()), bench.markdown(found)
    if out is not None:
        files = {"bench.json": json.dumps(result, indent=1) + "\n", "bench.md": text, "bench.svg": bench.plot(found)}
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
        result["paths"] = [str(out / name) for name in files]
    _print(options, result, text)
    return 0


def _explain(options: argparse.Namespace) -> int:
    import numpy as np

    from laws_ros.core.library import Library
    from laws_ros.runtime.explain import explain
    from laws_ros.runtime.files import resolve

    library = Library.load(resolve(options.library))
    chosen: list[int] = np.argsort(-library.visits, kind="stable").tolist()
    if options.region is not None:
        chosen = _find_region(library, options.region)
    elif not options.all:
        chosen = chosen[:10]
    laws = explain(library, chosen)
    result = {
        "policy": library.card.name,
        "policy_sha256": library.policy_sha256,
        "tolerance": _plain(library.tolerance),
        "total_regions": len(library),
        "regions": [asdict(law) for law in laws],
    }
    text = [f"{len(library)} laws for {library.card.name} (policy {library.policy_sha256[:12]}); {len(laws)} shown"]
    _print(options, result, "\n\n".join(text + [law.text() for law in laws]))
    return 0


def _report(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit
    from laws_ros.build.report import report
    from laws_ros.core.certificate import check_kinds
    from laws_ros.core.library import Library
    from laws_ros.runtime.cached_policy import open_pair
    from laws_ros.runtime.files import resolve
    from laws_ros.runtime.history import timeline

    start, progress = time.monotonic(), _Progress("report")
    path, out = resolve(options.library), _writable(options.out)
    library, policy, workload = Library.load(path), None, None
    beside = resolve(options.policy) if options.policy else path.with_suffix(".onnx")
    if options.policy or beside.is_file():
        library, policy = open_pair(path, beside)
    name = options.workload or library.notes.get("workload", "none")
    if policy is not None and name != "none":
        try:
            workload = workloads.get(name, policy)
            check_fit(policy, workload)
        except LawsError as error:  # the library's own workload may need a simulator that is not here
            if options.workload:
                raise
            print(f"laws report: without a workload: {error}", file=sys.stderr)
            workload = None
    kinds = check_kinds(_names(options.kinds))
    moments = timeline(resolve(options.history)) if options.history else []
    text = report(
        library, policy, workload, steps=options.steps, seed=options.seed, kinds=kinds, moments=moments,
        title=path.name, progress=progress,
    )  # fmt: skip
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    size, seconds = out.stat().st_size, round(time.monotonic() - start, 2)
    result = {"paths": [str(out)], "bytes": size, "regions": len(library), "seconds": seconds}
    _print(options, result, f"{out}: {size / 1e3:.0f} kB about {len(library)} experts, {seconds} s")
    return 0


def _find_region(library: Library, name: str) -> list[int]:
    found = [k for k, region in enumerate(library.ids) if region.startswith(name)]
    if name.isdigit() and len(name) < 8 and int(name) < len(library):  # a number; ids have 16 digits
        found = [int(name)]
    if len(found) != 1:
        what = "no region has" if not found else f"{len(found)} regions have"
        raise LibraryError(f"--region {name!r}: {what} an id that starts so; `laws explain LIB --all` lists them")
    return found


def _export_vnnlib(options: argparse.Namespace) -> int:
    from laws_ros.build.vnnlib import export
    from laws_ros.core.library import Library
    from laws_ros.runtime.files import resolve

    path = resolve(options.library)
    library = Library.load(path)
    policy = resolve(options.policy) if options.policy else path.with_suffix(".onnx")
    (region,) = _find_region(library, options.region)
    paths = [str(p) for p in export(library, policy, region, options.out)]
    _print(options, {"region": library.ids[region], "paths": paths}, "\n".join(paths))
    return 0


def _workloads(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads

    rows, lines = [], []
    for name, about in workloads.names():
        try:
            known = workloads.parameters(name)
        except LawsError:  # its simulator is not installed
            known = {}
        rows.append({"name": name, "about": about, "parameters": {k: asdict(p) for k, p in known.items()}})
        lines.append(f"{name:16} {about}")
        for key, p in known.items():
            values = ", ".join(p.choices) if p.choices else f"{p.low:g} to {p.high:g}"
            lines.append(f"{'':16}   ?{key}={p.default}  {p.about} ({values})")
    _print(options, {"workloads": rows}, "\n".join(lines))
    return 0


def _returns_text(cached: float, policy: float) -> str:
    if math.isnan(policy):
        return "a recording is replayed, not driven: there is no return"
    return f"return {cached:.2f}, policy alone {policy:.2f} ({100 * cached / policy:.2f}%)"


def _folder(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _writable(path: str) -> Path:
    """A file to write, in a folder that exists."""
    out = Path(path).expanduser()
    if out.is_dir():
        raise ConfigError(f"{out}: a folder of that name exists already; name a new file")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out}: the folder {out.absolute().parent} does not exist")
    return out


def _driven(options: argparse.Namespace) -> tuple[Policy, Workload]:
    """The policy and the workload of a command that simulates."""
    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit

    policy = _open_policy(options.policy)
    workload = workloads.get(options.workload)
    check_fit(policy, workload)
    return policy, workload


def _record(options: argparse.Namespace) -> int:
    from laws_ros.build import bags
    from laws_ros.build.evaluate import policy_rollouts

    out, progress = _writable(options.out), _Progress("record")
    policy, workload = _driven(options)
    found = policy_rollouts(
        policy,
        workload,
        options.episodes,
        options.seed,
        parts=_folder(options.parts),
        progress=lambda done, steps: progress.bar(
            max(done / options.episodes, steps / (options.episodes * workload.spec.episode_steps)),
            f"{done} of {options.episodes} episodes, {steps} steps",
        ),
    )
    messages = bags.record(found, workload.spec, out)
    steps = sum(len(r) for r in found.rewards)
    result = {
        "path": str(out),
        "messages": messages,
        "steps": steps,
        "episodes": options.episodes,
        "return": float(found.returns.mean()),
    }
    _print(
        options,
        result,
        f"{out}: {messages} messages, {options.episodes} episodes, {steps} steps, mean return {result['return']:.2f}",
    )
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from laws_ros.build import calibrate

    picture = _writable(options.plot) if options.plot else None
    if not 0.0 < options.keep < 1.0:
        raise ConfigError(f"--keep {options.keep:g}: a share between 0 and 1 is needed")
    policy, workload = _driven(options)
    found = calibrate.calibrate(
        policy, workload, options.episodes, options.seed, options.keep, progress=_Progress("calibrate")
    )
    if picture is not None:
        calibrate.plot(found, f"{policy.path.name} on {workload.spec.name}", picture)
    lines = [f"{name:10} {100 * share:.2f}% of each action's range" for name, share in found.tolerance_by_error.items()]
    _print(
        options,
        asdict(found) | {"workload": workload.spec.name},
        f"the largest error that keeps {100 * found.keep:g}% of a return of {found.return_policy:.2f}:\n"
        + "\n".join(lines)
        + f"\ntolerance: {'at least ' if found.beyond else ''}{100 * found.tolerance:.2f}% of each action's range "
        f"(worst: {found.adversary}; {found.episodes} episodes each)",
    )
    return 0


def _history_length(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads
    from laws_ros.build.history_length import history_length, windowed_rollouts

    policy = _open_policy(options.policy, options.decision)
    workload = workloads.get(options.workload, policy)
    target = parse_tolerance(options.distortion, policy, workload)
    names = [c.name for c in workload.spec.observations]
    frames = options.frames or policy.observations // len(names)
    whole = len(names) == policy.observations
    context = () if whole else tuple(names.index(name) for name in workload.spec.context)
    progress = _Progress("history-length")
    windows = windowed_rollouts(policy, workload, frames, options.episodes, options.seed, progress)
    found = history_length(policy, windows, frames, target, context)
    rows = zip(found.distortion, found.distortion_99, [*found.sensitivity, 0.0], strict=True)
    lines = ["frames  distortion mean   99%   sensitivity to the next older one (all in targets)"]
    lines += [f"{k:6}  {mean:15.3f} {most:5.3f}   {next_:.3g}" for k, (mean, most, next_) in enumerate(rows, start=1)]
    for law in found.laws:
        about = f"l^-{law.rate:.3g}" if law.name == "power" else f"e^(-{law.rate:.3g} l)"
        lines.append(f"{law.name:12} {law.scale:.3g} {about}   AIC {law.aic:.1f}")
    if found.laws and not found.decided:
        lines.append("these lags do not tell the two laws apart")
    if found.predicted is not None:
        lines.append(
            f"by the first law {found.predicted} frames keep the mean within the target, however long the past"
        )
    lines.append(f"{found.window} of {frames} frames keep 99% of {found.observations} observations within the target")
    result = asdict(found) | {"workload": workload.spec.name, "target": _plain(target)}
    _print(options, result, "\n".join(lines))
    return 0


def _adapt(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads
    from laws_ros.build.adapt import adapt
    from laws_ros.build.evaluate import check_fit

    out = _writable(options.out)
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: a name that ends in .onnx is needed")
    policy = _open_policy(options.policy, options.decision)
    workload = workloads.get(options.workload)
    check_fit(policy, workload)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    found = adapt(
        policy,
        workload,
        out,
        tolerance,
        {key: getattr(options, key) for key in ("hidden", "steps", "episodes", "check_episodes")},
        max_regions=options.max_regions,
        seed=options.seed,
        progress=_Progress("adapt"),
    )

    def share(coverage: Any) -> str:
        return "cannot be certified" if coverage.answered is None else f"{100 * coverage.answered:.1f}%"

    _print(
        options,
        asdict(found) | {"path": str(out), "tolerance": _plain(tolerance), "workload": workload.spec.name},
        f"{out}: return {found.return_adapted:.2f}, of {policy.path.name} {found.return_policy:.2f}\n"
        f"held-out observations answered within {_tolerance_text(policy, tolerance)} by a library of at most "
        f"{options.max_regions} regions: {share(found.coverage_adapted)}, before {share(found.coverage_policy)}",
    )
    return 0


def _render(options: argparse.Namespace) -> int:
    from laws_ros.build import render

    out = _writable(options.out)
    render.choose_backend()
    policy, workload = _driven(options)
    seconds = render.contact_sheet(
        workload, lambda x: policy.decide(policy.batch(x)), out, options.seed, options.seconds
    )
    _print(
        options,
        {"path": str(out), "bytes": out.stat().st_size, "seconds": seconds},
        f"{out}: {seconds:.2f} s of {workload.spec.name}, {out.stat().st_size / 1e3:.0f} kB",
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from laws_ros.build import train

    result = train.train(
        options.workload,
        Path(options.out),
        seed=options.seed,
        log=lambda text: print(text, file=sys.stderr),
        recipe=train.KINDS[options.policy](options.workload),
    )
    _print(options, result, json.dumps(_finite(result), indent=2))
    return 0


def _bundle(options: argparse.Namespace) -> int:
    from laws_ros.runtime.bundle import bundle
    from laws_ros.runtime.files import resolve

    config = resolve(options.config) if options.config else None
    manifest = bundle(resolve(options.library), resolve(options.policy), options.out, config)
    lines = [f"{name}: {file['bytes']} bytes, sha256 {file['sha256'][:12]}" for name, file in manifest["files"].items()]
    _print(options, {"path": options.out, **manifest}, "\n".join([f"wrote {options.out}", *lines]))
    return 0


def _install(options: argparse.Namespace) -> int:
    from laws_ros.runtime.bundle import install, roll_back

    if options.roll_back == (options.bundle is not None):
        raise ConfigError("name a bundle to install, or --roll-back, not both")
    release = roll_back(options.into) if options.roll_back else install(options.bundle, options.into)
    _print(options, {"release": str(release)}, f"{options.into}/current is {release.name}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from laws_ros.runtime.doctor import examine
    from laws_ros.runtime.files import resolve

    if options.library and not options.policy:
        raise ConfigError("--library needs the --policy that it was made for")
    policy, library = (resolve(path) if path else None for path in (options.policy, options.library))
    findings = examine(policy, library, _names(options.providers))
    failed = [f for f in findings if f.verdict == "fail"]
    lines = [f"{f.verdict:5}{f.topic:24}{f.text}" for f in findings]
    verdict = "do not run certificates on this machine" if failed else "fit to run"
    _print(options, {"fit": not failed, "findings": [f._asdict() for f in findings]}, "\n".join([*lines, "", verdict]))
    return 1 if failed else 0


def _library_command(options: argparse.Namespace) -> int:
    from laws_ros.runtime import history

    if options.action in ("review", "release"):
        return _review(options)
    if not options.out:
        raise ConfigError(f"library {options.action}: --out, the file to write, is needed")
    if options.action == "recover":
        found = history.recover(options.history, options.out)._asdict()
        text = f"wrote {options.out}: " + ", ".join(f"{count} {name}" for name, count in found.items())
    else:
        library = history.snapshot(options.history)
        library.save(options.out)
        found = {"regions": len(library), "digest": library.digest}
        text = f"wrote {options.out}: {len(library)} regions"
    _print(options, {"path": options.out, **found}, text)
    return 0


def _review(options: argparse.Namespace) -> int:
    """What operators took over for, and its release."""
    import numpy as np

    from laws_ros.runtime import takeovers

    folder = Path(options.history).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; a controller's parameter 'state' names it")
    if options.action == "release":
        if not options.takeover:
            raise ConfigError(f"--takeover ID is needed; `laws library review {folder}` lists them")
        takeovers.release(folder, options.takeover, options.reason)
        text = f"{options.takeover} is released: controllers and learners of {folder} take note of it by themselves"
        _print(options, {"released": options.takeover, "reason": options.reason}, text)
        return 0
    rows, lines = [], []
    for t in takeovers.read(folder):
        with np.errstate(all="ignore"):
            apart = np.nanmax(np.abs(t.operator - t.policy), axis=0, initial=0.0).tolist()
        rows.append(
            {"id": t.id, "robot": t.robot, "began": t.began, "duration_s": t.duration_s, "steps": len(t.observations)}
            | {
                "regions": t.regions,
                "largest_difference": dict(zip(t.actions, apart, strict=True)),
                "released": t.released,
            }
        )
        far = ", ".join(f"{name} {value:.3g}" for name, value in zip(t.actions, apart, strict=True))
        lines.append(
            f"{t.id}  {t.robot}  {t.duration_s:.1f} s, {len(t.observations)} steps in {len(t.regions)} regions; "
            f"operator and policy apart by up to {far}; {'released: ' + t.released if t.released else 'IN FORCE'}"
        )
    _print(options, {"takeovers": rows}, "\n".join(lines or [f"{folder}: nobody has taken over"]))
    return 0


def _up(options: argparse.Namespace) -> int:
    from laws_ros.nodes import up

    given = {name: getattr(options, name) for name in ("policy", "library") if getattr(options, name)}
    return up.run(
        options.robot,
        options.namespace or [""],
        not options.no_sim,
        options.seconds,
        options.record,
        options.state,
        {"controller": given, "learner": given},
    )


def _top(options: argparse.Namespace) -> int:
    from laws_ros.nodes import top

    once = options.once or options.json
    found = top.run(once)
    if once:
        text = "\n".join(f"{name}: {top.line(facts)}" for name, facts in sorted(found.items()))
        _print(options, found, text or "no controller has reported")
    return 0 if found else 1


def _fleet(options: argparse.Namespace) -> int:
    if options.action == "init":
        options.tolerance = parse_tolerance(options.tolerance, _open_policy(options.policy))

    def learn(desk: Desk) -> int:
        from laws_ros.build.learn import Learner
        from laws_ros.runtime.onnx_graph import load_network

        network, progress = load_network(desk.place.policy.path), _Progress("fleet")
        with desk.place.history() as history:
            memory = desk.folder / "fleet" / "lessons.npz"
            return Learner(history, desk.place.policy, network, memory=memory).learn(progress=progress).added

    result, text = fleet.run(options, _Progress("fleet"), learn)
    _print(options, result, text)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from laws_ros.nodes import demo

    summary, code = demo.run(
        seconds=options.seconds, policy=options.policy, library=options.library, seed=options.seed, json=options.json
    )
    if options.json:
        print(json.dumps(_finite(summary)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
