"""How much history a key needs: how fast a policy over a window of past frames forgets them.

Cut to its newest L frames a window is filled up again with what these predict of the older ones (linear regression;
discrete context is held), so that the policy becomes a function of L frames. With pi_L for that function, and errors in
units of the target distortion (the largest over the actions):

    sensitivity S(l) = mean |pi_{l+1} - pi_l|      what the frame at lag l adds to all newer ones
    distortion  D(L) = |pi - pi_L|                 so mean D(L) <= the sum of S(l) over the lags l >= L

The regression is fitted on half of the episodes, everything is measured on the other half. Two laws are fitted to the
logarithm of S, a power law l^-rate (arXiv:2605.25085 finds it for token sequences) and an exponential e^(-rate l); they
have as many parameters, so Akaike's criterion compares their likelihoods. This is a measurement, no proof: certificates
stay functions of the whole window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import ConfigError, WorkloadError
from laws_ros.runtime.policy import Policy

from .evaluate import check_fit, policy_rollouts
from .workloads import Workload, episode_seed

Floats = NDArray[np.float64]

QUANTILE = 0.99  # of observations that a sufficient window keeps within the target
CLEAR = 2.0  # a smaller difference of AIC is no evidence (Burnham & Anderson 2002)
RIDGE = 1e-6  # of the regression, relative to the variance of a frame's entries
FARTHEST = 100_000  # frames; windows longer than this are not predicted


@dataclass(frozen=True)
class Law:
    """S(l) = scale l^-rate ("power") or scale e^(-rate l) ("exponential"), as fitted, and Akaike's criterion."""

    name: str
    scale: float
    rate: float
    aic: float

    def window(self) -> int | None:
        """The fewest frames whose mean distortion stays within the target if the law goes on for ever; None if no
        number does (or more than FARTHEST)."""
        lag = np.arange(1.0, FARTHEST + 1)
        if self.rate <= (1.0 if self.name == "power" else 0.0):
            return None
        if self.name == "power":  # Euler and Maclaurin's first terms of the sum from a lag on
            tail = self.scale * (lag ** (1.0 - self.rate) / (self.rate - 1.0) + 0.5 * lag**-self.rate)
        else:
            tail = self.scale * np.exp(-self.rate * lag) / -np.expm1(-self.rate)
        enough = np.flatnonzero(tail <= 1.0)
        return int(lag[enough[0]]) if len(enough) else None


@dataclass(frozen=True)
class HistoryLength:
    """What was measured, in units of the target distortion.

    Attributes:
        frames: K, in the policy's window.
        sensitivity: [K - 1] S(l) for l = 1 ... K - 1.
        distortion, distortion_99: [K] mean and 99th percentile of D(L) for L = 1 ... K; the last is zero.
        laws: the better one first; `decided`: it is clearly so. Empty where too few lags matter at all.
        window: the fewest frames with which 99% of the observations are answered within the target.
        predicted: the same for mean distortions from the better law, for a policy with an endless window.
        observations: measured on.
    """

    frames: int
    sensitivity: list[float]
    distortion: list[float]
    distortion_99: list[float]
    laws: list[Law]
    decided: bool
    window: int
    predicted: int | None
    observations: int


def history_length(
    policy: Policy, windows: list[NDArray[np.float32]], frames: int, target: Floats, context: tuple[int, ...] = ()
) -> HistoryLength:
    """Measure how much of its window a policy needs.

    Args:
        windows: per episode the observations [T, n] that the policy was given, n = frames times a frame's length; the
            oldest frame first.
        target: [m] distortion of each action, action units; empty for a decision, of which every change is too much.
        context: entries of a frame that are discrete.

    Raises:
        ConfigError: less than two frames, a window that does not consist of them, or a target that is not positive.
        WorkloadError: too few observations to tell.
    """
    n = policy.observations
    if frames < 2 or n % frames:
        raise ConfigError(
            f"{policy.path}: {n} observations are no {frames} frames; give --frames, at least 2, for a policy that "
            "sees several past observations at once"
        )
    if not (np.asarray(target) > 0).all():
        raise ConfigError(f"distortion {np.asarray(target).tolist()}: positive values are needed")
    if len(windows) == 1:
        windows = np.array_split(windows[0], 2)
    learnt, measured = (np.concatenate(windows[k::2]) for k in (0, 1))
    if len(learnt) < 2 * n or not len(measured):
        raise WorkloadError(f"{len(learnt)} observations to learn from; at least {2 * n} are needed, so more episodes")
    cut = _Cut(learnt, frames, context)
    actions = [_answers(policy, cut(measured, kept)) for kept in range(1, frames)] + [_answers(policy, measured)]
    apart = [_apart(a, b, target) for a, b in pairwise(actions)]
    from_whole = [_apart(a, actions[-1], target) for a in actions]
    sensitivity = np.array([error.mean() for error in apart])
    noise = 8 * 2.0**-23 * float(np.max(np.abs(actions[-1]) / (target if len(target) else 1.0), initial=0.0))
    laws = _laws(sensitivity, noise)
    most = [float(np.quantile(error, QUANTILE)) for error in from_whole]
    return HistoryLength(
        frames,
        sensitivity.tolist(),
        [float(error.mean()) for error in from_whole],
        most,
        laws,
        len(laws) == 2 and laws[1].aic - laws[0].aic > CLEAR,
        next(kept for kept, error in enumerate(most, start=1) if error < 1.0),
        laws[0].window() if laws else None,
        len(measured),
    )


def windowed_rollouts(
    policy: Policy,
    workload: Workload,
    frames: int,
    episodes: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[NDArray[np.float32]]:
    """Per episode the windows [T, n] that the policy saw, for `history_length`.

    A workload that gives whole windows is run as it is. To one that gives single frames the last ones are remembered,
    and an episode begins with copies of its first frame. Of a recorded bag, its stretches.

    Raises:
        WorkloadError: the workload gives neither, or takes other actions than the policy gives.
    """
    given, spec = len(workload.spec.observations), workload.spec
    if policy.observations not in (given, given * frames) or policy.actions != len(spec.actions):
        raise WorkloadError(
            f"{policy.path}: takes {policy.observations} observations and gives {policy.actions} actions; {spec.name} "
            f"gives {given} (in {frames} frames: {given * frames}) and takes {len(spec.actions)}"
        )
    if policy.observations == given:
        check_fit(policy, workload)
        recorded = workload.recorded
        return list(recorded or policy_rollouts(policy, workload, episodes, seed).observations)
    if workload.recorded is not None:
        return [np.concatenate(_stacked(stretch, frames)) for stretch in workload.recorded]
    simulation, found = workload.simulation(), []
    for episode in range(episodes):
        frame = simulation.reset(episode_seed(seed, episode))
        window, seen = np.tile(frame, frames), []
        for _ in range(workload.spec.episode_steps):
            seen.append(window)
            action = policy.decide(policy(window))
            step = simulation.step(int(action[0]) if workload.spec.discrete else action)
            window = np.concatenate([window[len(frame) :], step.observation])
            if step.terminated:
                break
        found.append(np.array(seen, np.float32))
        progress(f"episode {episode + 1} of {episodes}")
    simulation.close()
    return found


def _stacked(stretch: NDArray[np.float32], frames: int) -> list[NDArray[np.float32]]:
    padded = np.concatenate([np.repeat(stretch[:1], frames - 1, axis=0), stretch])
    return [padded[k : k + frames].reshape(1, -1) for k in range(len(stretch))]


class _Cut:
    """Windows cut to their newest frames and filled up with what these predict of the older ones."""

    def __init__(self, windows: NDArray[np.float32], frames: int, context: tuple[int, ...]) -> None:
        self.frames, self.width, self.context = frames, windows.shape[1] // frames, list(context)
        self.mean = windows.mean(axis=0, dtype=float)
        spread = windows.std(axis=0, dtype=float)
        self.scale = np.where(spread > 1e-9, spread, 1.0)
        z = (windows - self.mean) / self.scale
        self.covariance = z.T @ z / len(z)

    def __call__(self, windows: NDArray[np.float32], kept: int) -> NDArray[np.float32]:
        """Windows [N, n] of which the newest `kept` frames are left."""
        old = (self.frames - kept) * self.width
        new = self.covariance[old:, old:]
        slopes = np.linalg.solve(new + RIDGE * np.eye(len(new)), self.covariance[old:, :old])
        z = (windows[:, old:] - self.mean[old:]) / self.scale[old:]
        filled = windows.copy()
        filled[:, :old] = z @ slopes * self.scale[:old] + self.mean[:old]
        by_frame = filled.reshape(len(filled), self.frames, self.width)
        first = self.frames - kept
        by_frame[:, :first, self.context] = by_frame[:, first : first + 1, self.context]
        return filled


def _answers(policy: Policy, windows: NDArray[np.float32]) -> Floats:
    return np.asarray(policy.decide(policy.batch(windows)), float)


def _apart(a: Floats, b: Floats, target: Floats) -> Floats:
    """[N]: the largest difference of two answers in units of the target; of decisions 1 where they differ."""
    return (np.abs(a - b) / target).max(axis=1) if len(target) else (a != b).any(axis=1).astype(float)


def _laws(sensitivity: Floats, noise: float) -> list[Law]:
    """Both laws by least squares in the logarithm, the likelier first; none from less than four lags above noise."""
    lag = 1.0 + np.flatnonzero(sensitivity > noise)
    if len(lag) < 4:
        return []
    wanted, laws = np.log(sensitivity[lag.astype(int) - 1]), []
    for name, along in (("power", np.log(lag)), ("exponential", lag)):
        (slope, offset), residual, *_ = np.polyfit(along, wanted, 1, full=True)
        error = max(float(residual[0]), 1e-24) / len(lag)
        laws.append(Law(name, float(np.exp(offset)), float(-slope), float(len(lag) * np.log(error) + 2 * 3)))
    return sorted(laws, key=lambda law: law.aic)
