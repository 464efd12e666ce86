from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.core.trie import LEAF, Splitter, Trie
from tests.support import random_regions


def random_trie(rng: np.random.Generator, inputs: int, splits: int) -> Trie:
    splitter, leaves = Splitter(), [0]
    for _ in range(splits):
        leaf = leaves.pop(int(rng.integers(len(leaves))))
        leaves += splitter.split(leaf, int(rng.integers(inputs)), float(rng.normal()))
    return splitter.trie()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 30), st.integers(1, 40))
def test_a_leaf_lists_every_region_that_contains_an_observation(seed: int, n: int, splits: int, count: int) -> None:
    """Any-match: the trie never hides a region, whatever its questions are."""
    rng = np.random.default_rng(seed)
    regions = random_regions(rng, count, n, 1.0)
    trie = random_trie(rng, n, splits).with_regions(regions, rng.permutation(count))
    xi = rng.uniform(-1, 1, (50, n))
    which = rng.integers(count, size=50)
    x = regions.center[which] + np.einsum("nij,nj->ni", np.linalg.inv(regions.transform[which]), xi)
    for point, inside in zip(x, regions.contains(x), strict=True):
        leaf = trie.leaf(point)
        listed = trie.members[trie.first[leaf] : trie.first[leaf + 1]]
        assert set(np.flatnonzero(inside)) <= set(listed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_lists_follow_the_preference_not_the_order_of_insertion(seed: int) -> None:
    rng = np.random.default_rng(seed)
    regions = random_regions(rng, 20, 2, 1.0)
    trie, name = random_trie(rng, 2, 8), rng.permutation(20)  # name[k] stands for region k's content hash
    shuffle = rng.permutation(20)
    a = trie.with_regions(regions, np.argsort(name))
    b = trie.with_regions(regions[shuffle], np.argsort(name[shuffle]))
    assert (a.first == b.first).all()
    assert (name[a.members] == name[shuffle][b.members]).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 200))
def test_probabilities_of_leaves_add_up_and_are_never_zero(seed: int, visits: int) -> None:
    rng = np.random.default_rng(seed)
    trie = random_trie(rng, 3, 12).counted(rng.normal(size=(visits, 3)))
    probability = trie.probabilities()
    leaves = trie.axis == LEAF
    assert abs(probability[leaves].sum() - 1) < 1e-12
    assert (probability > 0).all()
    assert trie.visits[0] == visits and trie.visits[leaves].sum() == visits


def test_edge_probability_is_the_krichevsky_trofimov_estimate() -> None:
    splitter = Splitter()
    splitter.split(0, 0, 0.0)
    trie = splitter.trie().counted(np.array([[-1.0], [-2.0], [1.0]]))
    assert trie.edge_probability(0, False) == 2.5 / 4
    assert trie.edge_probability(0, True) == 1.5 / 4


def test_counts_of_two_sources_add_up() -> None:
    rng = np.random.default_rng(0)
    trie = random_trie(rng, 2, 10)
    x, y = rng.normal(size=(2, 50, 2))
    assert (trie.counted(x).counted(y).visits == trie.counted(np.concatenate([x, y])).visits).all()
