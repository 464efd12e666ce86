from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.core.region import Regions


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.floats(1e-6, 1e3),
    st.floats(0, 1e4),
    st.integers(0, 5),
    st.sampled_from([None, 0.0, 0.0, 1e-9, 1e-5, 1e-2]),
)
def test_generators_enclose_all_that_the_router_accepts(
    seed: int, n: int, radius: float, distance: float, round: int, off: float | None
) -> None:
    rng = np.random.default_rng(seed)
    axes = rng.normal(size=(1, n, n)) * np.exp(rng.normal(size=(1, 1, n)))
    region = Regions.from_axes(
        distance * rng.normal(size=(1, n)), axes, radius * rng.uniform(size=(1, n)), min(round, n)
    )
    assert region.inverse is not None
    region = replace(region, inverse=None if off is None else region.inverse * (1 + off * rng.normal(size=(1, n, n))))
    generators, eps = region.generators()
    if not np.isfinite(eps[0]):
        assert np.isnan(generators).all()
        return
    ball = region.ball[0]
    xi = rng.uniform(-1, 1, (200, n))
    xi[:100] = np.sign(xi[:100])
    if ball.any():  # to the ball's surface, or as far inside as they were
        size = np.linalg.norm(xi[:, ball], axis=1, keepdims=True)
        xi[:, ball] /= np.where(np.arange(200)[:, None] < 100, size, np.maximum(size, 1.0))
    x = region.center[0] + (np.linalg.inv(region.transform[0]) @ xi.T).T
    for point in x[region.contains(x)[:, 0]][:8]:
        # zeta = M^-1 (x - c), in exact arithmetic
        zeta = _solve(
            generators[0],
            [Fraction(float(p)) - Fraction(float(c)) for p, c in zip(point, region.center[0], strict=True)],
        )
        assert max(abs(z) for z in zeta) <= 1
        assert sum(z * z for z, round in zip(zeta, ball, strict=True) if round) <= 1
        computed = region.coordinates(point[None])[0, 0]
        assert max(abs(z - Fraction(float(c))) for z, c in zip(zeta, computed, strict=True)) <= Fraction(float(eps[0]))


def _solve(matrix: np.ndarray, right: list[Fraction]) -> list[Fraction]:
    n = len(right)
    rows = [[Fraction(float(v)) for v in row] + [right[k]] for k, row in enumerate(matrix)]
    for k in range(n):
        pivot = max(range(k, n), key=lambda r: abs(rows[r][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for r in range(n):
            if r != k and rows[r][k]:
                factor = rows[r][k] / rows[k][k]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[k], strict=True)]
    return [rows[k][n] / rows[k][k] for k in range(n)]


def test_corners_of_a_ball_are_outside() -> None:
    region = Regions.from_axes(np.zeros((1, 3)), np.eye(3)[None], np.ones((1, 3)), 2)  # a cylinder along x
    x = np.array([[0.99, 0.7, 0.7], [0.99, 0.8, 0.8], [1.01, 0.0, 0.0], [0.0, 0.0, -0.99], [0.0, np.nan, 0.0]])
    assert region.contains(x)[:, 0].tolist() == [True, False, False, True, False]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8))
def test_a_brief_region_is_nearly_the_same_and_stays(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(1, n, n)))[0]
    region = Regions.from_axes(
        rng.normal(size=(1, n)), axes, 10.0 ** rng.uniform(-3, 0, (1, n)), int(rng.integers(n + 1))
    )
    brief = region.brief()
    x = region.sample(rng, np.zeros(50, np.intp), 0.5)
    moved = brief.coordinates(x)[:, 0] - region.coordinates(x)[:, 0]
    assert np.abs(moved).max() <= 3e-3 and (brief.round == region.round).all()
    again = brief.brief()
    assert (again.transform == brief.transform).all() and (again.center == brief.center).all()


def test_a_region_of_zero_width_is_a_point() -> None:
    center = np.array([[1.0, -2.0, 3.0]])
    region = Regions.from_axes(center, np.eye(3)[None], np.zeros((1, 3)))
    assert region.contains(center)[0, 0]
    assert not region.contains(np.nextafter(center.astype(np.float32), np.float32(10)))[0, 0]
    assert np.isfinite(region.generators()[1]).all()


def test_nan_is_in_no_region_and_a_broken_region_has_no_generators() -> None:
    region = Regions.from_axes(np.zeros((1, 2)), np.eye(2)[None], np.ones((1, 2)))
    assert not region.contains(np.array([[0.0, np.nan]]))[0, 0]
    for bad in (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)), np.full((1, 2, 2), np.inf), np.ones((1, 2, 2))):
        generators, eps = Regions(np.zeros((1, 2)), bad).generators()
        assert np.isinf(eps[0]) and np.isnan(generators).all()
    _, eps = Regions(np.array([[np.nan, 0.0]]), np.eye(2)[None]).generators()
    assert np.isinf(eps[0])
