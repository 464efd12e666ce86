"""The dependency rule of docs/architecture.md, checked on the source: nodes | cli -> build | runtime -> core.

Every import counts, wherever it stands, except under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "laws_ros"
ROOT = Path(__file__).parents[1]

# What each part may import of the others, and from outside besides the standard library.
PARTS: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), {"numpy"}),
    "runtime": ({"core"}, {"numpy", "onnx", "onnxruntime", "yaml", "numba"}),
    "build": ({"core", "runtime"}, {"numpy", "scipy", "yaml", "onnx", "onnxruntime", "torch", "mujoco", "gymnasium"}),
    "fleet": ({"core", "runtime"}, {"numpy", "fsspec", "tuf", "securesystemslib", "cryptography"}),
    "nodes": (
        {"core", "runtime", "build", "fleet"},
        {"numpy", "rich", "rclpy", "rcl_interfaces", "builtin_interfaces"},
    ),
    "cli": ({"core", "runtime", "build", "fleet", "nodes"}, {"numpy", "rich"}),
}
PARTS["build"][1].update({"matplotlib", "PIL", "rosbags", "array_api_compat", "ray"})  # pictures, bags, bounds on torch
PARTS["nodes"][1].add("rosbags")
MESSAGES = {"diagnostic_msgs", "rosgraph_msgs", "sensor_msgs", "std_msgs", "std_srvs", "lifecycle_msgs"}
PARTS["nodes"][1].update(MESSAGES)

HOT = ("runtime.cached_policy", "nodes.controller", "nodes.loop")
# what the hot path must not reach
OFFLINE = ("core.bounds", "core.propagate", "core.relax", "core.certify", "core.checker", "build", "fleet")
HEAVY = {"torch", "gymnasium", "mujoco", "ray"}


def imports(tree: ast.Module, module: str) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, is it inside a function) of every import of a module."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from package import module` imports the module, so the longest name that is one counts.
            yield from ((".".join([*base, alias.name]), inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, False)


class Source:
    """The package's modules and whom they import."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.imports = {
            module.removesuffix(".__init__"): list(imports(ast.parse(text), module)) for module, text in texts.items()
        }

    @classmethod
    def read(cls) -> Source:
        files = (ROOT / PACKAGE).rglob("*.py")
        return cls({".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files})

    def own(self, name: str) -> str | None:
        """The module of this package that an imported name means."""
        while name and name not in self.imports:
            name = name.rpartition(".")[0]
        return name if name.startswith(PACKAGE) else None

    def violations(self) -> list[str]:
        found = []
        for module, names in self.imports.items():
            part = module.split(".")[1] if "." in module else None
            if part is None:
                continue
            inner, outer = PARTS[part]
            for name, _ in names:
                top = name.split(".")[0]
                own = self.own(name)
                target = own.split(".")[1] if own and "." in own else None
                if own and target and target != part and target not in inner:
                    found.append(f"{module} imports {own}")
                elif not own and top not in outer and top not in sys.stdlib_module_names and top != "__future__":
                    found.append(f"{module} imports {top}")
        return found

    def reached(self, start: str) -> dict[str, str]:
        """Every module that importing and calling `start` can load, with one chain that leads there."""
        chains, todo = {start: start}, [start]
        while todo:
            module = todo.pop()
            packages = [module.rpartition(".")[0]] if "." in module else []
            for name in [*packages, *(name for name, _ in self.imports[module])]:
                own = self.own(name)
                if own and own not in chains:
                    chains[own] = f"{chains[module]} -> {own}"
                    todo.append(own)
        return chains


def test_layers() -> None:
    assert Source.read().violations() == []


@pytest.mark.parametrize("hot", HOT)
def test_hot_path_does_not_reach_the_certifier(hot: str) -> None:
    reached = Source.read().reached(f"{PACKAGE}.{hot}")
    assert len(reached) > 5
    for offline in OFFLINE:
        for module, chain in reached.items():
            assert not f"{module}.".startswith(f"{PACKAGE}.{offline}."), chain


def test_commands_import_heavy_modules_late() -> None:
    """`laws --help` and listing workloads load nothing heavy."""
    source = Source.read()
    todo, seen = [f"{PACKAGE}.cli", f"{PACKAGE}.build.workloads"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        for name, inside in source.imports[module]:
            assert inside or name.split(".")[0] not in HEAVY, f"{module} imports {name} at its top"
            own = source.own(name)
            if own and not inside and own not in seen:
                todo.append(own)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("core.x", "import onnx", "laws_ros.core.x imports onnx"),
        ("core.x", "def f():\n    from ..runtime import files", "laws_ros.core.x imports laws_ros.runtime"),
        ("runtime.x", "from laws_ros.build.grow import grow", "laws_ros.runtime.x imports laws_ros.build.grow"),
        ("build.x", "import rclpy.node", "laws_ros.build.x imports rclpy"),
        ("nodes.x", "import torch", "laws_ros.nodes.x imports torch"),
    ],
)
def test_the_check_finds_violations(module: str, text: str, expected: str) -> None:
    known = {name: "" for name in ("laws_ros", "laws_ros.runtime", "laws_ros.build.grow")}
    assert Source({**known, f"{PACKAGE}.{module}": text}).violations() == [expected]


def test_the_check_follows_chains() -> None:
    texts = {
        "laws_ros.runtime.a": "from .b import x",
        "laws_ros.runtime.b": "def f():\n    from laws_ros.core import z",
        "laws_ros.core.__init__": "from .bounds import y",
        "laws_ros.core.bounds": "",
    }
    assert "laws_ros.core.bounds" in Source(texts).reached("laws_ros.runtime.a")
