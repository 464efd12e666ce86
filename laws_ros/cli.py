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

if TYPE_CHECKING:
    from laws_ros.build.workloads import Workload
    from laws_ros.core.library import Library
    from laws_ros.runtime.policy import Policy

EXTRAS = {"rclpy": "ros", "mujoco": "sim", "rich": "sim", "gymnasium": "gym", "torch": "train", "scipy": "train"}
HELDOUT = 1_000_003  # added to a seed: held-out episodes share nothing with those learned from


def main(arguments: list[str] | None = None) -> int:
    """Run `laws ...`; returns the exit code: 0 success, 1 the command's own check failed, 2 bad input."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="laws", description="Certified experts in front of a large learned policy.")
    parser.add_argument("--version", action="version", version=f"laws_ros {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return sub

    workload = "cartpole, gym:ENV_ID, ... (`laws workloads` lists them)"
    c = command("build", _build, "grow and certify a library over what a workload visits")
    c.add_argument("--policy", required=True, help="the policy, an ONNX file")
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--out", required=True, help="where to write the library")
    c.add_argument(
        "--tolerance",
        default=None,
        help="largest action error: a number in action units, a share of each action's range such as 2.5%%, or one "
        "value per action separated by commas (default 2.5%%)",
    )
    c.add_argument("--decision", choices=("none", "argmax", "argmin"), help="how outputs become a discrete action")
    c.add_argument("--max-regions", type=_positive, default=20_000)
    c.add_argument("--steps", type=_positive, default=100_000, help="observations to learn from (default 100000)")
    c.add_argument("--seed", type=_count, default=0)

    c = command("verify", _verify, "try to break a library: re-check every certificate, sample, attack")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--samples", type=_count, default=100_000)
    c.add_argument("--attack", action="store_true", help="also climb the error by projected gradient")
    c.add_argument("--seed", type=_count, default=0)

    c = command("eval", _eval, "run a workload with the library and with the policy alone")
    c.add_argument("library")
    c.add_argument("--policy", required=True)
    c.add_argument("--workload", required=True, help=workload)
    c.add_argument("--episodes", type=_positive, default=10)
    c.add_argument("--tolerance", default=None, help="as for build (default: the library's)")
    c.add_argument("--seed", type=_count, default=12345)

    c = command("explain", _explain, "print a library's laws in sensor names and units")
    c.add_argument("library")
    c.add_argument("--region", help="a region's id (or its first digits) or number; default: the ten most used")
    c.add_argument("--all", action="store_true", help="every region")

    c = command("export-vnnlib", _export_vnnlib, "write a certificate for other verifiers (ONNX and VNN-LIB)")
    c.add_argument("library")
    c.add_argument("--region", required=True, help="a region's id (or its first digits) or number")
    c.add_argument("--out", required=True, help="folder for the difference network and the property")
    c.add_argument("--policy", help="default: the ONNX file beside the library, of its name")

    command("workloads", _workloads, "list the workloads")

    c = command("train", _train, "train a workload's full policy again")
    c.add_argument("workload")
    c.add_argument("--out", default="models", help="folder for the model, its card and the manifest (default models)")
    c.add_argument("--seed", type=_count, default=0)

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

    return Policy(resolve(path), threads or os.cpu_count() or 1, decision)


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
    parts = (text or "2.5%").split(",")
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
    import numpy as np

    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit, visited
    from laws_ros.build.grow import grow
    from laws_ros.runtime.onnx_graph import load_network
    from laws_ros.runtime.routing import Router

    start, progress = time.monotonic(), _Progress("build")
    out = Path(options.out)
    if not out.absolute().parent.is_dir():
        raise LibraryError(f"--out {out}: the folder {out.absolute().parent} does not exist")
    if out.is_dir():
        raise LibraryError(f"--out {out}: is a folder; the name of a file is needed")
    policy = _open_policy(options.policy, options.decision)
    network = load_network(policy.path)
    workload = workloads.get(options.workload)
    check_fit(policy, workload)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    seen = visited(policy, workload, options.steps, options.seed)
    heldout = visited(policy, workload, math.ceil(options.steps / 5), options.seed + HELDOUT)
    rolled = time.monotonic()
    progress(f"{len(seen.returns)} episodes of {workload.spec.name} run, return {seen.returns.mean():.1f}")
    observations = np.concatenate(seen.observations)
    actions = np.concatenate(seen.actions)
    growth = grow(policy, network, observations, actions, tolerance, options.max_regions, progress=progress)
    fresh = np.concatenate(heldout.observations)
    hit_rate = float((Router(growth.library, tolerance).many(fresh) >= 0).mean()) if len(growth.library) else 0.0
    result = {
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
        "rollout_seconds": round(rolled - start, 2),
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
        ),
    )
    return 0


def _tolerance_text(policy: Policy, tolerance: Any) -> str:
    if policy.card.decision != "none":
        return f"the policy's own {policy.card.decision}"
    return ", ".join(f"{v:g} {c.unit}".strip() for v, c in zip(tolerance, policy.card.actions, strict=True))


def _verify(options: argparse.Namespace) -> int:
    import numpy as np

    from laws_ros.build.verify import verify
    from laws_ros.runtime.cached_policy import open_pair
    from laws_ros.runtime.files import resolve
    from laws_ros.runtime.onnx_graph import load_network

    start = time.monotonic()
    library, policy = open_pair(resolve(options.library), resolve(options.policy), os.cpu_count() or 1)
    found = verify(
        library, policy, load_network(policy.path), options.samples, options.attack, options.seed, _Progress("verify")
    )
    ratio = found.ratio[~np.isnan(found.ratio)]
    result = {
        "certificates": len(library),
        "rechecked": found.rechecked,
        "unknown": found.unknown,
        "samples": found.samples,
        "attacks": found.attacks,
        "violations": found.violations,
        "first_violation": found.first,
        "median_bound_over_worst_seen": float(np.median(ratio)) if len(ratio) else None,
        "seconds": round(time.monotonic() - start, 2),
    }
    good = found.violations == 0 and found.unknown == 0
    text = (
        f"{found.rechecked} of {len(library)} certificates proved again by the checker, {found.unknown} unknown\n"
        f"{found.samples} samples and {found.attacks} attacks through ONNX Runtime (float32): "
        f"{found.violations} violations\n"
    )
    if len(ratio):
        text += f"certified bound over worst error seen: median {np.median(ratio):.2f}\n"
    if found.first:
        text += f"first violation: {found.first}\n"
    _print(options, result, text + ("every bound held" if good else "NOT every bound could be shown to hold"))
    return 0 if good else 1


def _eval(options: argparse.Namespace) -> int:
    from laws_ros.build import workloads
    from laws_ros.build.evaluate import check_fit, evaluate
    from laws_ros.runtime.cached_policy import CachedPolicy, open_pair
    from laws_ros.runtime.files import resolve

    library, policy = open_pair(resolve(options.library), resolve(options.policy))
    workload = workloads.get(options.workload)
    check_fit(policy, workload)
    tolerance = parse_tolerance(options.tolerance, policy, workload) if options.tolerance else None
    cached = CachedPolicy(library, policy, tolerance)
    found = evaluate(cached, workload, options.episodes, options.seed, _Progress("eval"))
    result = asdict(found) | {"episodes": options.episodes, "tolerance": _plain(cached.tolerance)}
    _print(
        options,
        result,
        (
            f"{found.steps} steps, {100 * found.hit_rate:.2f}% answered by the library within "
            f"{_tolerance_text(policy, cached.tolerance)}\n"
            f"return {found.return_cached:.2f}, policy alone {found.return_policy:.2f} "
            f"({100 * found.return_cached / found.return_policy:.2f}%)\n"
            f"worst error over its bound: {found.worst_error_over_bound:.3f}, {found.violations} violations\n"
            f"hit p50 {found.hit_us['p50']:.1f} us, p99 {found.hit_us['p99']:.1f} us; policy p50 "
            f"{found.policy_us['p50']:.1f} us, p99 {found.policy_us['p99']:.1f} us; mean step "
            f"{found.mean_step_us:.1f} us, {found.mean_step_speedup:.1f} times cheaper than the policy alone"
        ),
    )
    return 0 if found.violations == 0 else 1


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

    rows = workloads.names()
    width = max(len(name) for name, _ in rows)
    _print(
        options,
        {"workloads": [{"name": name, "about": about} for name, about in rows]},
        "\n".join(f"{name:{width}}  {about}" for name, about in rows),
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    from laws_ros.build.train import train

    result = train(
        options.workload, Path(options.out), seed=options.seed, log=lambda text: print(text, file=sys.stderr)
    )
    _print(options, result, json.dumps(_finite(result), indent=2))
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
