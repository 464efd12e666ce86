"""Collapsed networks: the policy over a region, with most of its neurons replaced by what they are there.

Over a region a neuron is on one linear piece of its function, or hardly bends and may be replaced by a line, or is
kept. What lies between kept neurons is affine and is multiplied out: with h_1, h_2, ... the kept neurons of one
elementwise node after the other, and each matrix acting on the basis (1, x, h_1, h_2, ...) of what comes before,

    h_1 = f_1(A_1 (1, x)),   h_2 = f_2(A_2 (1, x, h_1)),   ...,   action = C (1, x, h_1, h_2, ...).

Only the neurons' states (and the lines' numbers) are stored; the matrices are multiplied out again, in float64 and then
rounded to float32, from the policy's own weights. Nothing here proves anything: `collapse` certifies, and
`collapse_checker` proves the very matrices that are executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .certificate import Certificates
from .errors import LibraryError, ModelError
from .network import Affine, Elementwise, Network, Node

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

# States of neurons: the number of the function's linear piece, counted from the left, or one of
LINE, KEPT = 254, 255


def check_network(network: Network) -> None:
    """Raises ModelError for a network that has more than affine maps and elementwise functions."""
    for node in network.nodes:
        if not isinstance(node, Affine | Elementwise):
            raise ModelError(
                f"{node.name}: a {type(node).__name__} node cannot be folded into a collapsed expert; build with kind "
                "linear or statistical"
            )


def pieces(node: Elementwise) -> list[tuple[float, float]]:
    """Slope and offset of each linear piece of a function from the left, separated by its kinks; NaN where it bends."""
    p, bent = node.parameters, (np.nan, np.nan)
    known: dict[str, Callable[[], list[tuple[float, float]]]] = {
        "relu": lambda: [(0.0, 0.0), (1.0, 0.0)],
        "leakyrelu": lambda: [(p[0], 0.0), (1.0, 0.0)],
        "clip": lambda: [(0.0, p[0]), (1.0, 0.0), (0.0, p[1])],
        "elu": lambda: [bent, (1.0, 0.0)],
        "selu": lambda: [bent, (p[1], 0.0)],
        "hardswish": lambda: [(0.0, 0.0), bent, (1.0, 0.0)],
    }
    return known.get(node.function, lambda: [bent] * (1 + len(node.facts.kinks(p))))()


@dataclass(frozen=True)
class States:
    """How a region's neurons stand.

    Attributes:
        code: uint8, one per neuron of the policy's elementwise nodes, in the order of nodes.
        lines: float32 [k, 2], slope and offset of the neurons in state LINE, in the same order.
    """

    code: NDArray[np.uint8]
    lines: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 2), np.float32))

    @classmethod
    def of(cls, certificates: Certificates, index: int, network: Network) -> States:
        """Those of a stored certificate.

        Raises:
            LibraryError: they do not fit the network.
        """
        code, flat = certificates.octets.row(index), certificates.floats.row(index)
        neurons = sum(node.size for node in network.nodes if isinstance(node, Elementwise))
        if len(code) != neurons or (reason := inconsistency(code, flat)):
            reason = reason if len(code) == neurons else f"{len(code)} neuron states, the policy has {neurons} neurons"
            raise LibraryError(f"expert {index}: its collapsed network is not one of this policy: {reason}")
        states = cls(code, flat.reshape(-1, 2))
        for _, node, state, slope, _ in states.split(network):
            if np.isnan(slope[state != KEPT]).any():
                raise LibraryError(f"expert {index}: a {node.function} of {node.name!r} has no such linear piece")
        return states

    def split(self, network: Network) -> Iterator[tuple[int, Elementwise, NDArray[np.uint8], Array, Array]]:
        """Per elementwise node: its index, the node, states, and slope and offset of what replaces each neuron.

        Both are NaN for a kept neuron, and for a piece that the function does not have.
        """
        start = used = 0
        for index, node in enumerate(network.nodes, start=1):
            if not isinstance(node, Elementwise):
                continue
            state = self.code[start : start + node.size]
            start += node.size
            table = np.full((256, 2), np.nan)
            known = pieces(node)
            table[: len(known)] = known
            line = table[state]
            here = np.flatnonzero(state == LINE)
            line[here] = self.lines[used : used + len(here)]
            used += len(here)
            yield index, node, state, line[:, 0], line[:, 1]


def inconsistency(code: NDArray[np.uint8], lines: NDArray[np.float32]) -> str | None:
    """What is wrong with the stored parts of a collapsed expert, as far as can be said without the policy."""
    count = int((code == LINE).sum())
    if len(code) == 0:
        return "it has no neuron states"
    if lines.size != 2 * count:
        return f"{lines.size} numbers for the lines of {count} neurons"
    return None if np.isfinite(lines).all() else "a line is not finite"


@dataclass(frozen=True)
class Stage:
    """The kept neurons of one elementwise node: f(weight @ (1, x, h_1, h_2, ...)), columns of all earlier stages."""

    node: Elementwise
    kept: Indices
    weight: Array


@dataclass(frozen=True)
class Collapsed:
    """A collapsed network, multiplied out.

    Attributes:
        inputs: length n of the observation.
        stages: one per elementwise node of the policy, in order; some are without neurons.
        output: [m, 1 + n + all kept neurons]
    """

    inputs: int
    stages: tuple[Stage, ...]
    output: Array

    @property
    def matrices(self) -> tuple[Array, ...]:
        return (*(stage.weight for stage in self.stages), self.output)

    @cached_property
    def blocks(self) -> list[slice]:
        """Columns of (1, x), h_1, h_2, ... in the basis."""
        ends = np.cumsum([1 + self.inputs, *(len(stage.kept) for stage in self.stages)])
        return [slice(0 if k == 0 else int(ends[k - 1]), int(ends[k])) for k in range(len(ends))]

    def used(self) -> list[list[bool]]:
        """Per matrix, which blocks of its columns are not all zero; (1, x) always counts as used."""
        return [
            [k == 0 or bool(matrix[:, block].any()) for k, block in enumerate(self.blocks[: max(1, stage + 1)])]
            for stage, matrix in enumerate(self.matrices)
        ]

    @property
    def multiplications(self) -> int:
        return sum(
            len(matrix) * (block.stop - block.start)
            for matrix, used in zip(self.matrices, self.used(), strict=True)
            for block, use in zip(self.blocks, used, strict=False)
            if use
        )

    def rounded(self) -> Collapsed:
        """As it is executed: every matrix rounded to float32 (held in float64)."""

        def single(matrix: Array) -> Array:
            with np.errstate(over="ignore"):
                return matrix.astype(np.float32).astype(float)

        stages = tuple(Stage(stage.node, stage.kept, single(stage.weight)) for stage in self.stages)
        return Collapsed(self.inputs, stages, single(self.output))

    def network(self) -> Network:
        """The same as a layer graph of its own, without the parts that are all zero."""
        nodes: list[Node] = []
        blocks = [0]  # the node of each block of columns
        functions: list[Elementwise | None] = [*(stage.node for stage in self.stages), None]
        for function, matrix, used in zip(functions, self.matrices, self.used(), strict=True):
            parts = [(blocks[k], matrix[:, self.blocks[k]]) for k, use in enumerate(used) if use]
            weights = (parts[0][1][:, 1:], *(part for _, part in parts[1:]))
            if len(matrix):
                nodes.append(Affine(tuple(block for block, _ in parts), weights, matrix[:, 0]))
                if function is not None:
                    nodes.append(Elementwise(len(nodes), function.function, len(matrix), function.parameters))
            blocks.append(len(nodes))
        return Network(self.inputs, tuple(nodes))


@dataclass
class _Form:
    """A node as an affine function of the basis: `parts` per block of columns, and rows that are kept neurons.

    Attributes:
        parts: block -> [size, width]
        live: rows of the parts that are not all zero.
        block, kept: these rows are the columns of that block, and nothing else.
    """

    parts: dict[int, Array]
    live: Indices
    block: int = -1
    kept: Indices = field(default_factory=lambda: np.zeros(0, np.intp))


def needed(network: Network, states: States) -> list[NDArray[np.bool_]]:
    """Per node (0 the observation), which of its values can influence the action of the collapsed network."""
    sizes = [network.inputs, *(node.size for node in network.nodes)]
    need = [np.zeros(size, bool) for size in sizes]
    need[-1][:] = True
    moving = {index: ~(slope == 0.0) for index, _, _, slope, _ in states.split(network)}
    for index in range(len(network.nodes), 0, -1):
        node, wanted = network.nodes[index - 1], need[index]
        if isinstance(node, Elementwise):
            need[node.source] |= wanted & moving[index]
            continue
        assert isinstance(node, Affine)
        for source, weight, full in zip(node.sources, node.weights, _full(node), strict=True):
            if full:
                need[source] |= wanted if weight.ndim == 1 else wanted.any()
            else:
                need[source] |= wanted & (weight != 0.0) if weight.ndim == 1 else (weight[wanted] != 0.0).any(axis=0)
    return need


_FULL: WeakKeyDictionary[Affine, list[bool]] = WeakKeyDictionary()


def _full(node: Affine) -> list[bool]:
    """Per weight whether it has no zero; asked once per policy, as looking at millions of weights takes its time."""
    if node not in _FULL:
        _FULL[node] = [bool(np.all(weight)) for weight in node.weights]
    return _FULL[node]


def multiply_out(network: Network, states: States, magnitudes: bool = False) -> Collapsed:
    """The collapsed network with these states, in float64.

    Args:
        magnitudes: every weight, bias, slope and offset by its magnitude; the entries then bound the sums of magnitudes
            of all products that the plain ones were added up from (which their rounding errors are proportional to).
    """
    size: Callable[[Array], Array] = np.abs if magnitudes else np.asarray
    need = needed(network, states)
    observation = np.concatenate([np.zeros((network.inputs, 1)), np.eye(network.inputs)], axis=1)
    forms = [_Form({0: observation}, np.arange(network.inputs))]
    stages: list[Stage] = []
    lines = {index: (state, slope, offset) for index, _, state, slope, offset in states.split(network)}
    for index, node in enumerate(network.nodes, start=1):
        if isinstance(node, Affine):
            forms.append(_affine(node, forms, need[index], size))
            continue
        assert isinstance(node, Elementwise)
        state, slope, offset = lines[index]
        source, wanted = forms[node.source], need[index]
        widths = [1 + network.inputs, *(len(stage.kept) for stage in stages)]
        kept = np.flatnonzero(wanted & (state == KEPT))
        rows = [_rows(source, block, kept, width) for block, width in enumerate(widths)]
        stages.append(Stage(node, kept, np.concatenate(rows, axis=1)))
        # what is replaced, as rows of the same blocks
        live = np.flatnonzero(wanted & (state != KEPT) & ((slope != 0.0) | (offset != 0.0)))
        parts = {}
        for block, width in enumerate(widths):
            part = np.zeros((node.size, width))
            part[live] = size(slope[live])[:, None] * _rows(source, block, live, width)
            if block == 0:
                part[live, 0] += size(offset[live])
            if part.any():
                parts[block] = part
        forms.append(_Form(parts, live, len(stages), kept))
    widths = [1 + network.inputs, *(len(stage.kept) for stage in stages)]
    rows = [_rows(forms[-1], block, np.arange(network.outputs), width) for block, width in enumerate(widths)]
    return Collapsed(network.inputs, tuple(stages), np.concatenate(rows, axis=1))


def _rows(form: _Form, block: int, rows: Indices, width: int) -> Array:
    """[len(rows), width]: these rows of a form, in the columns of one block."""
    part = form.parts[block][rows] if block in form.parts else np.zeros((len(rows), width))
    if block == form.block:
        part = part + (rows[:, None] == form.kept[None, :])
    return part


def _affine(node: Affine, forms: list[_Form], wanted: NDArray[np.bool_], size: Callable[[Array], Array]) -> _Form:
    """W form + b, only in the rows that are wanted."""
    rows = np.flatnonzero(wanted)
    parts: dict[int, Array] = {}

    def add(block: int, term: Array) -> None:
        parts.setdefault(block, np.zeros((node.size, term.shape[1])))[rows] += term

    add(0, np.zeros((len(rows), forms[0].parts[0].shape[1])))
    parts[0][rows, 0] += size(node.bias[rows])
    for source, weight in zip(node.sources, node.weights, strict=True):
        form = forms[source]
        if weight.ndim == 1:
            for block, part in form.parts.items():
                add(block, size(weight[rows])[:, None] * part[rows])
            if len(form.kept):
                add(form.block, size(weight[rows])[:, None] * (rows[:, None] == form.kept[None, :]))
        else:
            here = size(weight[np.ix_(rows, form.live)])
            for block, part in form.parts.items():
                add(block, here @ part[form.live])
            if len(form.kept):
                add(form.block, size(weight[np.ix_(rows, form.kept)]))
    return _Form(parts, rows)
