from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from laws_ros.build.vnnlib import export
from laws_ros.core.card import Card
from laws_ros.core.certificate import decision_rows, kind_code, limited
from laws_ros.core.certify import certify
from laws_ros.core.errors import LawsError, LibraryError
from laws_ros.core.library import Library
from laws_ros.core.region import Regions
from laws_ros.core.trie import Trie
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import session
from tests.support import random_mlp, random_regions, save_mlp, save_model


def library_of(path: Path, regions: Regions, decision: str = "none", limit: float = np.inf) -> Library:
    """Of boxes, which is what VNN-LIB knows."""
    network = load_network(path)
    card = Card.plain("p", network.inputs, network.outputs, decision)
    card = replace(card, actions=tuple(replace(c, low=-limit, high=limit) for c in card.actions))
    boxes = Regions(regions.center, regions.transform)
    certificates = certify(network, boxes, decision, limits=card.limits if np.isfinite(limit) else None)
    visits = np.ones(len(regions), np.int64)
    library = Library(sha256_file(path), card, np.ones(network.outputs), certificates, Trie.root(), visits)
    return library.indexed(library.trie)


def small(folder: Path, sizes: list[int], count: int, radius: float, seed: int = 0, decision: str = "none") -> Library:
    rng = np.random.default_rng(seed)
    path = save_mlp(folder / "p.onnx", random_mlp(rng, sizes))
    return library_of(path, random_regions(rng, count, sizes[0], radius), decision)


def real_error(path: Path, library: Library, index: int, xi: NDArray) -> tuple[NDArray, NDArray]:
    """policy - expert [N, r] in float64, and the bound [N, r], at coordinates xi [N, n]."""
    c = library.certificates[index]
    x = c.center + np.linalg.solve(c.transform, xi.T).T
    rows = decision_rows(len(library.card.actions), library.card.decision)
    error = load_network(path)(x) @ rows.T - (x @ c.expert_weight.astype(float).T + c.expert_bias)
    return error, xi @ c.bound_weight.T + c.bound_offset


def points(rng: np.random.Generator, count: int, n: int) -> NDArray:
    xi = rng.uniform(-1, 1, (count, n)).astype(np.float32)
    xi[: count // 2] = np.sign(xi[: count // 2])
    return xi


def margins(network: Path, xi: NDArray) -> NDArray:
    """What the difference network answers in ONNX Runtime, [N, 2 r]."""
    run = session(str(network), str(network))
    return np.concatenate([run.run(["margin"], {"xi": row[None].astype(np.float32)})[0] for row in xi])


def shrunk(path: Path, library: Library, index: int) -> Library:
    """The bound of one certificate lowered to 0.9 of the largest error that sampling finds, where it was found."""
    xi = points(np.random.default_rng(1), 4000, library.certificates.center.shape[1]).astype(float)
    error, bound = real_error(path, library, index, xi)
    k, row = np.unravel_index(np.argmax(np.abs(error)), error.shape)
    offset = library.certificates.bound_offset.copy()
    offset[index, row] -= bound[k, row] - 0.9 * abs(error[k, row])
    return replace(library, certificates=replace(library.certificates, bound_offset=offset))


def parse(path: Path) -> tuple[list[str], dict[str, list[float | None]], set[tuple[str, str, float]]]:
    """A strict reader of the properties that are written: declared names, box of each X, and the disjunction."""
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";[^\n]*", "", path.read_text()))

    def read() -> list | str:
        token = tokens.pop(0)
        if token != "(":
            assert token != ")"
            return token
        found = []
        while tokens[0] != ")":
            found.append(read())
        tokens.pop(0)
        return found

    declared: list[str] = []
    box: dict[str, list[float | None]] = {}
    choices = None
    while tokens:
        command = read()
        if command[0] == "declare-const":
            _, name, kind = command
            assert kind == "Real" and name not in declared
            declared.append(name)
            continue
        name, formula = command
        assert name == "assert"
        if formula[0] == "or":
            assert choices is None
            choices = set()
            for term in formula[1:]:
                conjunction, (sign, variable, value) = term
                assert conjunction == "and" and variable in declared
                choices.add((sign, variable, float(value)))
        else:
            sign, variable, value = formula
            assert variable in declared
            side = {">=": 0, "<=": 1}[sign]
            limits = box.setdefault(variable, [None, None])
            assert limits[side] is None
            limits[side] = float(value)
    return declared, box, choices or set()


@pytest.mark.parametrize(("sizes", "decision"), [([3, 16, 16, 2], "none"), ([2, 12, 3], "argmax"), ([4, 1], "none")])
def test_the_files_say_what_the_certificate_says(tmp_path, sizes, decision) -> None:
    library = small(tmp_path, sizes, 6, 0.4, decision=decision)
    n, rng = sizes[0], np.random.default_rng(2)
    rows = library.certificates.bound_offset.shape[1]
    for index in range(len(library)):
        network, text = export(library, tmp_path / "p.onnx", index, tmp_path / "new" / "out")
        assert network.stem == text.stem == f"p-{library.ids[index]}"
        declared, box, choices = parse(text)
        assert declared == [f"X_{k}" for k in range(n)] + [f"Y_{k}" for k in range(2 * rows)]
        assert box == {f"X_{k}": [-1.0, 1.0] for k in range(n)}
        assert choices == {(">=", f"Y_{k}", 0.0) for k in range(2 * rows)}
        model = onnx.load(network)
        onnx.checker.check_model(model, full_check=True)
        assert model.opset_import == onnx.load(tmp_path / "p.onnx").opset_import
        assert [v.name for v in model.graph.input] == ["xi"] and [v.name for v in model.graph.output] == ["margin"]
        xi = points(rng, 200, n)
        error, bound = real_error(tmp_path / "p.onnx", library, index, xi.astype(float))
        expected = np.concatenate([error - bound, -error - bound], axis=1)
        found = margins(network, xi)
        np.testing.assert_allclose(found, expected, atol=2e-5 * (1 + np.abs(expected).max()))
        if sizes != [4, 1]:  # a linear policy's bound is nothing but rounding, which is what comes out here
            assert (found < 0).all()


def test_in_real_arithmetic_it_is_the_certificate_and_hardly_more(tmp_path) -> None:
    """Also of thin regions far from zero, where constants rounded to float32 would speak of another region."""
    rng = np.random.default_rng(5)
    path = save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 16, 1]), "Tanh")
    axes, _ = np.linalg.qr(rng.normal(size=(8, 3, 3)))
    widths = np.array([0.5, 1e-3, 1e-6]) * np.ones((8, 3))
    library = library_of(path, Regions.from_axes(10.0 * rng.normal(size=(8, 3)), axes, widths))
    xi = points(rng, 500, 3).astype(float)
    for index in range(len(library)):
        file = export(library, path, index, tmp_path)[0]
        network = load_network(file)  # float64, with the file's constants
        error, bound = real_error(path, library, index, xi)
        expected = np.concatenate([error - bound, -error - bound], axis=1)
        assert (network(xi) < 0).all()
        np.testing.assert_allclose(network(xi), expected, atol=1e-4 * bound.max())
        # Every observation of the region is one of the property's, where a bound that is no larger is asked for.
        model = onnx.load(file)
        model.graph.output[0].name = "policy/observation"
        onnx.save(model, tmp_path / "front.onnx")
        front = load_network(tmp_path / "front.onnx")
        center = front(np.zeros((1, 3)))
        c = library.certificates[index]
        inside = c.center - center + np.linalg.solve(c.transform, xi.T).T
        written = np.linalg.solve((front(np.eye(3)) - center).T, inside.T).T
        assert (np.abs(written) <= 1.0).all() and np.abs(written).max() > 0.999
        assert (network(written) >= expected - 1e-12).all()


def test_a_shrunken_bound_is_exceeded_somewhere(tmp_path) -> None:
    library = small(tmp_path, [3, 16, 16, 2], 5, 0.6)
    for index in range(len(library)):
        false = shrunk(tmp_path / "p.onnx", library, index)
        network = export(false, tmp_path / "p.onnx", index, tmp_path)[0]
        xi = points(np.random.default_rng(1), 4000, 3)
        assert margins(network, xi).max() > 0


def test_policies_of_other_shapes(tmp_path) -> None:
    """No batch axis and names like ours; observations with axes of their own; a final Clip; a batch fixed to one."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2)).astype(np.float32)
    flat = helper.make_graph(
        [
            helper.make_node("MatMul", ["xi", "constant0"], ["value0"]),
            helper.make_node("Tanh", ["value0"], ["margin"]),
        ],
        "p",
        [helper.make_tensor_value_info("xi", onnx.TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("margin", onnx.TensorProto.FLOAT, [2])],
        [onnx.numpy_helper.from_array(weight, "constant0")],
    )
    deep = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
            helper.make_node("Relu", ["y"], ["z"]),
        ],
        "p",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 2])],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["batch", "actions"])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    for k, graph in enumerate((flat, deep)):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13 + k)], ir_version=8)
        onnx.save(model, tmp_path / f"{k}.onnx")
    save_mlp(tmp_path / "2.onnx", random_mlp(rng, [4, 8, 2]), clip=0.5)
    nodes = [helper.make_node("Gemm", ["observation", "w"], ["y"]), helper.make_node("Tanh", ["y"], ["action"])]
    save_model(tmp_path / "3.onnx", nodes, {"w": weight}, 4, 2, batch=1)
    for k in range(4):
        path = tmp_path / f"{k}.onnx"
        library = library_of(path, random_regions(rng, 2, 4, 0.3))
        xi = points(rng, 50, 4)
        error, bound = real_error(path, library, 1, xi.astype(float))
        found = margins(export(library, path, 1, tmp_path)[0], xi)
        np.testing.assert_allclose(found, np.concatenate([error - bound, -error - bound], axis=1), atol=1e-5)
        assert found.max() < 0


def test_delivered_actions(tmp_path) -> None:
    """Of policy and expert both cut to the card's limits, though the certificate bounds them before that."""
    rng = np.random.default_rng(7)
    path = save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 16, 2], 2.0), clip=1.0)
    library = library_of(path, random_regions(rng, 12, 3, 0.5), limit=1.0)
    assert limited(library.certificates).all()
    xi, beyond = points(rng, 300, 3), 0
    for index in range(len(library)):
        c = library.certificates[index]
        x = c.center + np.linalg.solve(c.transform, xi.T.astype(float)).T
        expert = x @ c.expert_weight.astype(float).T + c.expert_bias
        beyond += int((np.abs(expert) > 1.0).sum())
        error = load_network(path)(x) - np.clip(expert, -1.0, 1.0)
        bound = xi @ c.bound_weight.T + c.bound_offset
        found = margins(export(library, path, index, tmp_path)[0], xi)
        np.testing.assert_allclose(found, np.concatenate([error - bound, -error - bound], axis=1), atol=1e-4)
        assert (found < 0).all()
    assert beyond > 300  # or nothing was cut


def test_of_a_round_region_the_largest_box_in_it_is_written(tmp_path) -> None:
    rng = np.random.default_rng(3)
    path = save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 8, 2]))
    axes = np.linalg.qr(rng.normal(size=(1, 3, 3)))[0]
    regions = Regions.from_axes(rng.normal(size=(1, 3)), axes, np.array([[0.3, 0.2, 0.1]]), 2)
    library = replace(library_of(path, regions), certificates=certify(load_network(path), regions))
    network, text = export(library, path, 0, tmp_path)
    assert "largest box in it" in text.read_text()
    corners = 0.9995 * np.array(list(product((-1.0, 1.0), repeat=3)), np.float32)  # rounding does not throw them out
    found = margins(network, corners)
    factor = np.array([1.0, 1.001 * np.sqrt(2), 1.001 * np.sqrt(2)])
    x = regions.center + np.linalg.solve(factor[:, None] * regions.transform[0], corners.T.astype(float)).T
    inside, value, bound = library.certificates.at(np.zeros(8, int), x)
    assert inside.all() and not regions.contains(regions.center + 1.01 * (x - regions.center)).any()
    error = load_network(path)(x) - value
    np.testing.assert_allclose(found, np.concatenate([error - bound, -error - bound], axis=1), atol=1e-4)
    assert (found < 0).all()


def test_what_vnnlib_cannot_say_is_refused(tmp_path) -> None:
    library = small(tmp_path, [3, 8, 2], 1, 0.3)
    c = library.certificates
    for name, value, match in (
        ("kind", np.array([kind_code("exact")], np.uint8), "only affine experts .* is of kind exact"),
        ("kind", np.array([kind_code("statistical")], np.uint8), "only affine experts .* is of kind statistical"),
    ):
        with pytest.raises(LibraryError, match=match):
            export(replace(library, certificates=replace(c, **{name: value})), tmp_path / "p.onnx", 0, tmp_path)


def test_bad_input(tmp_path) -> None:
    library = small(tmp_path, [2, 4, 1], 2, 0.1)
    path = tmp_path / "p.onnx"
    for region in (-1, 2):
        with pytest.raises(LibraryError, match=f"region {region}: the library has 2"):
            export(library, path, region, tmp_path)
    other = save_mlp(tmp_path / "other.onnx", random_mlp(np.random.default_rng(9), [2, 4, 1]))
    with pytest.raises(LibraryError, match=r"sha256.*other\.onnx"):
        export(library, other, 0, tmp_path)
    with pytest.raises(LawsError, match="no such policy"):
        export(library, tmp_path / "absent.onnx", 0, tmp_path)
    offset = library.certificates.bound_offset.copy()
    offset[1] = np.inf
    unknown = replace(library, certificates=replace(library.certificates, bound_offset=offset))
    with pytest.raises(LibraryError, match="nothing to export"):
        export(unknown, path, 1, tmp_path)
    with pytest.raises(LibraryError, match="cannot be written"):
        export(library, path, 0, path)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[2, 8, 8, 1], [2, 8, 3]])
def test_marabou_proves_certificates_and_refutes_false_ones(tmp_path, sizes) -> None:
    """Another group's complete verifier, its own readers of both files; a decision's rows in the second case."""
    marabou = pytest.importorskip("maraboupy.Marabou", reason="maraboupy is not installed (Python 3.8 to 3.11 only)")
    options = marabou.createOptions(verbosity=0, timeoutInSeconds=60)
    decision = "none" if sizes[-1] == 1 else "argmin"

    def verdict(paths: list[Path]) -> tuple[str, NDArray]:
        network = marabou.read_onnx(str(paths[0]))
        answer, values, _ = network.solve(verbose=False, options=options, propertyFilename=str(paths[1]))
        return answer, np.array([values[v] for v in network.inputVars[0].ravel()] if values else [])

    path = tmp_path / "p.onnx"
    library = small(tmp_path, sizes, 6, 0.5, seed=3, decision=decision)
    for index in range(len(library)):
        assert verdict(export(library, path, index, tmp_path / "true"))[0] == "unsat"
        false = export(shrunk(path, library, index), path, index, tmp_path / "false")
        answer, xi = verdict(false)
        assert answer == "sat" and (np.abs(xi) <= 1 + 1e-6).all()
        assert margins(false[0], xi[None]).max() > -1e-5  # the counterexample is one
