from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laws_ros.build.verify import Executed, verify
from laws_ros.core import checker as module
from laws_ros.core.checker import Checker
from tests.support import break_certificates


def test_it_proves_what_was_certified(built) -> None:
    checker = Checker(built.network)
    certificates = built.library.certificates
    assert all(checker.verdict(certificates, k) == "holds" for k in range(len(certificates)))


@pytest.mark.parametrize(
    "what", ["bound_offset", "bound_weight", "expert_weight", "expert_bias", "center", "transform"]
)
def test_it_never_proves_a_false_certificate(built, what) -> None:
    """Every field is changed until sampling finds a violation; the checker must then not say "holds"."""
    rng = np.random.default_rng(0)
    certificates = built.library.certificates[:25]
    value = getattr(certificates, what)
    scale = {"bound_offset": -0.9, "center": 1.0, "transform": -0.6}.get(what, 0.2)
    if what in ("bound_offset", "transform"):
        changed = (value * (1 + scale)).astype(value.dtype)
    else:
        changed = (value + scale * rng.choice([-1, 1], size=value.shape)).astype(value.dtype)
    false = replace(certificates, **{what: changed})
    checker, proved_false = Checker(built.network), 0
    executed = Executed(built.policy, false)
    inverse = np.linalg.inv(false.transform)
    violated = 0
    for k in range(len(false)):
        xi = rng.uniform(-1, 1, (3000, 3))
        x = (false.center[k] + xi @ inverse[k].T).astype(np.float32)
        inside, error, bound = executed.compare(np.full(3000, k), x)
        if (inside & (error > bound).any(axis=1)).any():
            violated += 1
            proved_false += checker.verdict(false, k) == "holds"
    assert violated >= 5  # or the test proves nothing
    assert proved_false == 0


def test_unknown_for_what_is_not_finite(built) -> None:
    c = built.library.certificates[:1]
    for name in ("center", "transform", "bound_offset", "bound_weight", "expert_weight", "expert_bias"):
        for bad in (np.nan, np.inf):
            value = getattr(c, name).copy()
            value.flat[0] = bad
            assert Checker(built.network).verdict(replace(c, **{name: value}), 0) == "unknown"


def test_it_is_small_and_shares_no_bounding_code() -> None:
    source = Path(module.__file__).read_text()
    assert len(source.splitlines()) < 400
    imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "dataclasses", "itertools", "numpy.typing"} | {
        "certificate",
        "network",
    }
    certificate = ast.parse((Path(module.__file__).parent / "certificate.py").read_text())
    assert not {n.module for n in ast.walk(certificate) if isinstance(n, ast.ImportFrom)} & {"bounds", "certify"}


def test_verification_finds_a_planted_violation(built) -> None:
    library = built.library
    found = verify(library, built.policy, built.network, 20_000, attack=True)
    assert found.violations == 0 and found.unknown == 0 and found.samples >= 20_000 and found.attacks > 0
    offset = library.certificates.bound_offset.copy()
    offset[0] *= 0.2
    planted = replace(library, certificates=replace(library.certificates, bound_offset=offset))
    found = verify(planted, built.policy, built.network, 20_000, attack=True)
    assert found.violations > 0 and found.unknown == 1 and planted.ids[0] in (found.first or "")


def test_the_shared_attack_breaks_a_shrunken_bound(built) -> None:
    c = built.library.certificates
    rng = np.random.default_rng(0)
    assert break_certificates(built.policy, built.network, c, rng)[1] == 0
    assert break_certificates(built.policy, built.network, replace(c, bound_offset=0.3 * c.bound_offset), rng)[1] > 0
