"""Which experts to keep when not all fit: expected saving against LRU, LFU and a clairvoyant, on traffic that drifts.

The sorting arm runs for hours; which bins its parts belong into follows a Zipf law whose exponent and order change on
the way. As in deployment (build/learn.py) time goes in rounds: what the library of a round does not answer goes to the
policy and to the learner, and the experts that answer it are in the library of the next round; then the budget is
enforced. The experts are those of a grown library, and every rule sees the same requests.

A request is answered if any expert that is kept contains it within tolerance, so regions overlap and the best choice is
a covering problem. The clairvoyant chooses anew before every round, knowing its requests, among the experts that
contain a request of any earlier round: no rule of this model can do better. That maximum is bracketed: greedily chosen
experts reach at least the lower figure, and no choice more than the linear program's.

    python benchmarks/eviction.py --library LIB
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.build import workloads
from laws_ros.build.evaluate import observed, policy_rollouts
from laws_ros.build.grow import answered, grow
from laws_ros.core.library import Library
from laws_ros.core.retention import expected_savings, retained, sizes
from laws_ros.runtime.files import resolve
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy

Floats = NDArray[np.float64]

BINS = 6
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the library's bytes: the budgets
# exponent of the Zipf law, and the bins by their rank: the second half of the shift reverses it, the night is mixed
DRIFT = ((1.5, (1, 2, 3, 4, 5, 6)), (1.5, (6, 5, 4, 3, 2, 1)), (0.5, (3, 1, 5, 2, 6, 4)), (1.5, (1, 2, 3, 4, 5, 6)))
HALF_LIVES_MIN = (2.0, 10.0, 60.0)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Traffic(NamedTuple):
    """Requests in rounds.

    Attributes:
        able: [P, W] of every distinct observation the experts that answer it, the preferred first, then E.
        rounds: of each round the observations that it asks for.
        phase: [R] which part of the drift a round belongs to.
    """

    able: NDArray[np.intp]
    rounds: list[NDArray[np.intp]]
    phase: NDArray[np.intp]


def able(library: Library, x: NDArray[np.float32]) -> NDArray[np.intp]:
    """[P, W]: every expert that answers observation x[k], in the router's order, filled up with E."""
    trie, count = library.trie, len(library)
    leaves = np.array([trie.leaf(row) for row in x])
    found: list[NDArray[np.intp]] = [np.zeros(0, np.intp)] * len(x)
    for leaf in np.unique(leaves):
        members, here = trie.members[trie.first[leaf] : trie.first[leaf + 1]], np.flatnonzero(leaves == leaf)
        for part in np.array_split(here, 1 + len(here) * len(members) // 20_000):
            pairs = np.tile(members, len(part)), np.repeat(x[part], len(members), axis=0)
            hits = answered(library.certificates, *pairs, library.tolerance, "none").reshape(len(part), -1)
            for k, hit in zip(part, hits, strict=True):
                found[k] = members[hit]
    table = np.full((len(x), max(1, *(len(f) for f in found))), count)
    for k, members in enumerate(found):
        table[k, : len(members)] = members
    return table


def cycles(observations: list[NDArray[np.float32]], station: int, phase: int) -> tuple[list[NDArray[np.intp]], Any]:
    """Which of all observations belong to the handling of each part, and the part's bin."""
    parts, bins, offset = [], [], 0
    for x in observations:
        begins = np.flatnonzero((x[1:, phase] == 0) & (x[:-1, phase] == 5)) + 1
        for first, last in pairwise(begins):
            parts.append(offset + np.arange(first, last))
            bins.append(int(x[first:last, station].max()))
        offset += len(x)
    return parts, np.array(bins)


def traffic(table: NDArray[np.intp], parts: Any, bins: Any, minutes: float, round_steps: int, seed: int) -> Traffic:
    """Parts drawn by the drifting law, one after the other, cut into rounds."""
    rng = np.random.default_rng(seed)
    per_phase = round(minutes * 60 / 0.02 / len(DRIFT) / round_steps)
    rounds, phase = [], []
    for k, (exponent, order) in enumerate(DRIFT):
        chance = np.arange(1.0, BINS + 1) ** -exponent
        drawn, length = [], 0
        while length < per_phase * round_steps:
            bin_ = order[rng.choice(BINS, p=chance / chance.sum())]
            part = parts[rng.choice(np.flatnonzero(bins == bin_))]
            drawn.append(part)
            length += len(part)
        asked = np.concatenate(drawn)[: per_phase * round_steps]
        rounds += list(asked.reshape(per_phase, round_steps))
        phase += [k] * per_phase
    return Traffic(table, rounds, np.array(phase))


class Rule:
    """What the learner remembers of the experts, and by which number it ranks them."""

    def __init__(self, name: str, count: int, half_life_rounds: float = np.inf) -> None:
        self.name, self.fade = name, 0.5 ** (1.0 / half_life_rounds)
        self.answers, self.last = np.zeros(count), np.full(count, -1.0)

    def used(self, by: NDArray[np.intp]) -> None:
        """by: [N] who answered, or could have, in the order of the requests of a round."""
        self.answers = self.fade * self.answers + np.bincount(by, minlength=len(self.answers))
        self.last[by] = self.last.max() + 1.0 + np.arange(len(by))  # the last request of each wins

    def worth(self, cost: NDArray[np.int64], policy_cost: float) -> Floats:
        if self.name == "LRU":
            return self.last + 1.0
        if self.name == "LFU":
            return self.answers
        return expected_savings(self.answers, cost, policy_cost)


def run(rule: Rule, t: Traffic, size: Any, cost: Any, policy_cost: float, budget: int) -> Floats:
    """[R]: the share of the policy's multiplications that the library saved in each round."""
    count = len(size)
    kept, saved = np.zeros(count + 1, dtype=bool), []
    saving = np.append(np.maximum(policy_cost - cost, 0.0), 0.0) / policy_cost
    for asked in t.rounds:
        choices = t.able[asked]
        who = choices[np.arange(len(asked)), kept[choices].argmax(axis=1)]
        hit = kept[who]
        saved.append(float(saving[who][hit].sum()) / len(asked))
        back = np.where(hit, who, choices[:, 0])  # of a miss the expert that the learner brings (back)
        back = back[back < count]
        rule.used(back)
        kept[back] = True
        here = np.flatnonzero(kept[:count])
        stay = retained(rule.worth(cost, policy_cost)[here], size[here], most_bytes=budget)
        kept[:] = False
        kept[here[stay]] = True
        if size[kept[:count]].sum() > budget:
            raise AssertionError("over the budget")
    return np.array(saved)


def clairvoyant(t: Traffic, size: Any, cost: Any, policy_cost: float, budget: int) -> tuple[Floats, Floats]:
    """[R]: what the best choice before every round saves: at least (greedily), and at most (linear program)."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    count, saving = len(size), np.maximum(policy_cost - cost, 0.0) / policy_cost
    known, least, most = np.zeros(count + 1, dtype=bool), [], []
    for asked in t.rounds:
        choices = t.able[asked]
        sets, times = np.unique(np.where(known[choices], choices, count), axis=0, return_counts=True)
        row, column = np.nonzero(sets < count)
        expert = sets[row, column]
        # One variable per expert (kept or not) and per way to answer a set of requests; a set is answered once.
        ways = len(row)
        eye = np.arange(ways)
        by_expert = csr_array((np.ones(ways), (eye, expert)), shape=(ways, count))
        by_way = csr_array((np.ones(ways), (eye, eye)), shape=(ways, ways))
        limits = _stacked_blocks(by_expert, by_way, row, len(sets), size, budget)
        gain = np.concatenate([np.zeros(count), times[row] * saving[expert]])
        upper = np.concatenate([np.zeros(ways), np.ones(len(sets)), [1.0]])
        found = linprog(-gain, A_ub=limits, b_ub=upper, bounds=(0, 1), method="highs") if ways else None
        most.append(-found.fun / len(asked) if found is not None else 0.0)
        least.append(_greedy(sets, times, saving, size, budget) / len(asked))
        known[choices[choices < count]] = True
    return np.array(least), np.array(most)


def _stacked_blocks(by_expert: Any, by_way: Any, row: Any, sets: int, size: Any, budget: int) -> Any:
    """answered by an expert <= kept; a set's ways <= 1; bytes kept / budget <= 1."""
    from scipy.sparse import block_array, csr_array

    ways = by_way.shape[0]
    once = csr_array((np.ones(ways), (row, np.arange(ways))), shape=(sets, ways))
    return block_array([[-by_expert, by_way], [None, once], [csr_array(size[None] / budget), None]]).tocsr()


def _greedy(sets: Any, times: Any, saving: Floats, size: Any, budget: int) -> float:
    """What experts save that are chosen one by one, the most gain per byte first."""
    count, room = len(saving), budget
    row, column = np.nonzero(sets < count)
    expert, open_ = sets[row, column], np.ones(len(sets), dtype=bool)
    total, left = 0.0, np.ones(count, dtype=bool)
    while True:
        gain = np.bincount(expert, times[row] * open_[row], minlength=count) * saving
        gain[~left | (size > room)] = 0.0
        best = int(np.argmax(gain / size))
        if gain[best] <= 0.0:
            return total
        total += float(gain[best])
        open_[row[expert == best]] = False
        left[best] = False
        room -= size[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="models/arm_sort.onnx")
    parser.add_argument("--library", help="of that policy (default: one is grown from 60,000 observations; minutes)")
    parser.add_argument("--episodes", type=int, default=24, help="of 40 s, that parts are drawn from (default 24)")
    parser.add_argument("--minutes", type=float, default=160.0, help="of operation (default 160)")
    parser.add_argument("--round", type=float, default=30.0, help="seconds (default 30)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    workload = workloads.get("arm_sort?zipf=0")
    policy = Policy(resolve(options.policy))
    network = load_network(policy.path)
    if options.library:
        library = Library.load(resolve(options.library))
        library.check_policy(policy.sha256, policy.card, options.library, options.policy)
    else:
        seen = observed(policy, workload, 60_000, (0, 1))[0]
        x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
        library = grow(policy, network, x, y, 0.025 * policy.card.action_range, progress=say).library
    runs = policy_rollouts(policy, workload, options.episodes, options.seed).observations
    names = [c.name for c in policy.card.observations]
    parts, bins = cycles(runs, names.index("station"), names.index("phase"))
    table = able(library, np.concatenate(runs))
    t = traffic(table, parts, bins, options.minutes, round(options.round / 0.02), options.seed)
    size, cost, policy_cost = sizes(library.certificates), library.certificates.cost, float(network.parameters)
    count, rounds_per_minute = len(library), 60.0 / options.round
    say(f"{count} experts, {len(parts)} parts, {len(t.rounds)} rounds, {(table[:, 0] < count).mean():.3f} answerable")

    rules = [("LRU", np.inf), ("LFU", np.inf), *(("saving", h * rounds_per_minute) for h in HALF_LIVES_MIN)]
    unlimited = run(Rule("LRU", count), t, size, cost, policy_cost, int(size.sum())).mean()
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        budget = int(share * size.sum())
        row: dict[str, Any] = {"share": share, "bytes": budget, "saved": {}, "by_phase": {}}
        for name, half_life in rules:
            label = name if name != "saving" else f"saving, {half_life / rounds_per_minute:g} min"
            saved = run(Rule(name, count, half_life), t, size, cost, policy_cost, budget)
            row["saved"][label] = float(saved.mean())
            row["by_phase"][label] = [float(saved[t.phase == k].mean()) for k in range(len(DRIFT))]
        least, most = clairvoyant(t, size, cost, policy_cost, budget)
        row["saved"] |= {"clairvoyant, at least": float(least.mean()), "clairvoyant, at most": float(most.mean())}
        rows.append(row)
        say(f"{share:.0%}: {row['saved']}")
    result = {"experts": count, "bytes": int(size.sum()), "unlimited": float(unlimited), "budgets": rows}
    if options.json:
        print(json.dumps(result))
        return
    labels = list(rows[0]["saved"])
    print(f"share of the policy's multiplications saved; unlimited: {unlimited:.3f} ({count} experts)")
    print("| budget | " + " | ".join(labels) + " |\n|" + " --- |" * (1 + len(labels)))
    for row in rows:
        print(f"| {row['share']:.0%} | " + " | ".join(f"{row['saved'][k]:.3f}" for k in labels) + " |")


if __name__ == "__main__":
    main()
