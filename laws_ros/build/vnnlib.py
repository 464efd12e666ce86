"""Certificates for other verifiers: a difference network (ONNX) and a property (VNN-LIB 1.0) per certificate.

The network takes coordinates xi [1, n] in the region and computes, row by row of the certificate,

    Y = [policy - expert - bound(xi), expert - policy - bound(xi)]  [1, 2 r],   observation = center + generators @ xi

The property asks for a xi in [-1, 1]^n with some Y >= 0. So `unsat` means: for every observation that the router lets
into the region, abs(policy - expert) is below the certificate's bound, everything read as real numbers. That is less
than what the certificate promises of float32 execution, whose rounding errors are inside the same bound. And it is as
good as the verifier's own arithmetic: Marabou, for one, does not see violations of about 1e-8.

Where certificates are about delivered actions (core.certify), policy and expert are cut to the card's limits first,
written with ReLUs: low + relu(x - low) - relu(x - high). VNN-LIB's constraints are linear: of a round region the
largest box in it is written, over which the certificate promises the same.

A verifier reads float32 constants; the certificate's are float64. So that rounding proves nothing false:
  - Where float32 is too short an affine map is split into two, `high + low`, good to 2^-48.
  - `drift` bounds what is left, in coordinates. With M, eps of `Regions.generators` an accepted observation is exactly
    c + M zeta, abs(zeta - xi) <= eps. The written map c' + G xi' has G = (1 + 2 drift) M and both are off by what
    drift covers, so xi' = (zeta + d) / (1 + 2 drift) with abs(d) <= drift gives the same observation, lies in the box,
    and abs(xi' - xi) <= eps + 3 drift.
  - The written bound is lower by its slope times that, and by its own rounding.
The property is thereby a little stronger than the certificate; a certificate leaves far more room than that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix

from laws_ros.core.certificate import COLLAPSED, KINDS, Certificates, decision_rows
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.onnx_graph import load_model

Array = NDArray[np.float64]

SPLIT = 2.0**-46  # relative error of high + low, with room for the float64 products that lead there
TINY = 2.0**-140  # the same for values that float32 holds as denormals


def export(library: Library, policy_path: str | Path, region_index: int, out_dir: str | Path) -> list[Path]:
    """Write one certificate as `POLICY-ID.onnx` and `POLICY-ID.vnnlib` into a folder, which is made if need be.

    Args:
        policy_path: the ONNX file that the library was made for; its operators and opset are kept.
        region_index: of the certificate, 0 to len(library) - 1.

    Returns:
        The two paths, network first.

    Raises:
        LawsError: no such region, another policy, an expert that is not affine, a certificate that says nothing, or a
            folder that cannot be written.
    """
    policy_path, out_dir = Path(policy_path), Path(out_dir)
    model = load_model(policy_path)
    library.check_policy(sha256_file(policy_path), library.card, "library", str(policy_path))
    if not 0 <= region_index < len(library):
        raise LibraryError(f"region {region_index}: the library has {len(library)}, numbered from 0")
    kind, region = KINDS[library.certificates.kind[region_index]], library.ids[region_index]
    if kind in (*COLLAPSED, "statistical"):
        raise LibraryError(
            f"region {region}: only affine experts with a proof can be exported, and it is of kind {kind}"
        )
    name, k = f"{policy_path.stem}-{region}", region_index
    boxed = replace(library, certificates=_inscribed(library.certificates[k : k + 1]), visits=library.visits[k : k + 1])
    network, text = _difference(model, boxed, region), _property(library, k, name)
    paths = [out_dir / f"{name}.onnx", out_dir / f"{name}.vnnlib"]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        paths[0].write_bytes(network.SerializeToString())
        paths[1].write_text(text)
    except OSError as error:
        raise LibraryError(f"{error.filename or out_dir}: cannot be written: {error.strerror}") from None
    return paths


def _inscribed(certificate: Certificates) -> Certificates:
    """A certificate over the largest box in its region, with the same claim: a consequence of it."""
    factor = np.where(certificate.regions.ball[0], 1.001 * math.sqrt(max(int(certificate.round[0]), 1)), 1.0)
    return replace(
        certificate,
        transform=certificate.transform * factor[:, None],
        bound_weight=certificate.bound_weight / factor,
        round=np.zeros_like(certificate.round),
    )


def _difference(model: onnx.ModelProto, library: Library, region: str) -> onnx.ModelProto:
    """The policy's own graph between an affine map in front of it and affine maps beside and behind it.

    Args:
        library: of the one certificate. region: its id, for messages.
    """
    certificate = library.certificates
    inputs, actions = certificate.center.shape[1], len(library.card.actions)
    center, generators, weight, offset = _written(certificate, region)
    expert_weight, expert_bias = certificate.expert_weight[0].astype(float), certificate.expert_bias[0].astype(float)
    rows = decision_rows(actions, library.card.decision)

    model = add_prefix(model, "policy/")  # our names cannot meet the policy's
    graph = model.graph
    constants = {c.name for c in graph.initializer}
    (source,) = (value for value in graph.input if value.name not in constants)
    (target,) = graph.output
    nodes: list[onnx.NodeProto] = []
    numbers = count()

    def constant(value: NDArray) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"constant{next(numbers)}"))
        return graph.initializer[-1].name

    def node(operator: str, operands: list[str], result: str = "", **attributes: Any) -> str:
        result = result or f"value{next(numbers)}"
        nodes.append(helper.make_node(operator, operands, [result], name=result, **attributes))
        return result

    def total(terms: list[str], result: str = "") -> str:
        while len(terms) > 2:
            terms = [node("Add", terms[:2]), *terms[2:]]
        return node("Add", terms, result) if len(terms) == 2 else terms[0]

    def affine(x: str, matrix: Array, bias: Array) -> str:
        """matrix @ x + bias of float64 constants, as one map of float32 constants or the sum of two."""
        high = [v.astype(np.float32) for v in (matrix, bias)]
        low = [(v - h).astype(np.float32) for v, h in zip((matrix, bias), high, strict=True)]
        parts = [high, low] if any(v.any() for v in low) else [high]
        return total([node("Gemm", [x, *map(constant, part)], transB=1) for part in parts])

    def shape(value: onnx.ValueInfoProto) -> list[int]:
        """Its shape for one observation; 0 stands for what the file leaves open."""
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        return [1, *sizes[1:]] if len(sizes) > 1 else sizes

    xi = "xi"
    observation = affine(xi, generators, center)
    wanted = shape(source)
    if wanted == [1, inputs]:
        node("Identity", [observation], source.name)
    else:
        node("Reshape", [observation, constant(np.array(wanted, np.int64))], source.name)
    nodes += graph.node
    action = target.name
    if shape(target) != [1, actions]:
        action = node("Reshape", [action, constant(np.array([1, actions], np.int64))])

    def both(value: Array) -> Array:
        return np.concatenate([value, -value])

    def cut(value: str, ends: Array) -> str:
        above = [node("Relu", [affine(value, np.eye(actions), -end)]) for end in ends]
        return total(
            [affine(above[0], np.eye(actions), ends[0]), affine(above[1], -np.eye(actions), np.zeros(actions))]
        )

    limits = certificate.floats.row(0).astype(float).reshape(-1, actions)
    expert = [affine(observation, -both(expert_weight), -both(expert_bias))]
    if len(limits):
        action, value = (cut(x, limits) for x in (action, affine(observation, expert_weight, expert_bias)))
        expert = [affine(value, -both(np.eye(actions)), np.zeros(2 * actions))]
    total(
        [
            affine(action, both(rows), np.zeros(2 * len(rows))),
            *expert,
            affine(xi, -np.tile(weight, (2, 1)), -np.tile(offset, 2)),
        ],
        "margin",
    )
    for field in ("node", "input", "output", "value_info"):  # inner shapes may name the batch axis
        graph.ClearField(field)
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(xi, TensorProto.FLOAT, [1, inputs]))
    graph.output.append(helper.make_tensor_value_info("margin", TensorProto.FLOAT, [1, 2 * len(rows)]))
    graph.name, model.ir_version = "difference", max(model.ir_version, 4)  # 4: constants need not be inputs, too
    onnx.checker.check_model(model, full_check=True)
    return model


def _written(certificate: Certificates, region: str) -> tuple[Array, Array, Array, Array]:
    """Center [n], generators [n, n], bound's weight [r, n] and offset [r] as they are written (see above)."""
    generators, eps = certificate.regions.generators()
    center, weight, offset = certificate.center[0], certificate.bound_weight[0], certificate.bound_offset[0]
    with np.errstate(all="ignore"):
        reach = SPLIT * (np.abs(center) + np.abs(generators[0]).sum(axis=1)) + TINY
        drift = float((np.abs(certificate.transform[0]) @ reach).max())
        slope = np.abs(weight).sum(axis=1)
        lower = offset - 1.001 * (slope * (eps[0] + 3.0 * drift) + SPLIT * (slope + np.abs(offset)) + TINY)
        written = center, generators[0] * (1.0 + 2.0 * drift), weight, lower
        finite = all(np.isfinite(v.astype(np.float32)).all() for v in written)
    if not finite or not drift < 1e-4:
        raise LibraryError(
            f"region {region}: its certificate says nothing that float32 constants can hold (an unknown "
            "bound, or a region too flat); there is nothing to export"
        )
    return written


def _property(library: Library, index: int, name: str) -> str:
    rows, inputs = library.certificates.bound_weight.shape[1:]
    outputs = range(2 * rows)
    return "\n".join(
        [
            f"; Certificate {library.ids[index]} of the policy with sha256 {library.policy_sha256}",
            f"; Network: {name}.onnx. X: coordinates in the region. Y_k = policy - expert - bound in row k,",
            f"; Y_(k + {rows}) = expert - policy - bound.",
            "; unsat: in the whole region abs(policy - expert) < bound, in real arithmetic.",
            *(["; The region is round: this is the largest box in it."] if library.certificates.round[index] else []),
            "",
            *(f"(declare-const X_{k} Real)" for k in range(inputs)),
            *(f"(declare-const Y_{k} Real)" for k in outputs),
            "",
            *(f"(assert (>= X_{k} -1.0))\n(assert (<= X_{k} 1.0))" for k in range(inputs)),
            "",
            "(assert (or",
            *(f"  (and (>= Y_{k} 0.0))" for k in outputs),
            "))",
            "",
        ]
    )
