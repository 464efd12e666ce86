"""Sphinx builds this folder into a site: `make docs`. The reference pages are written from the code itself."""

from __future__ import annotations

import argparse
import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from laws_ros import __version__  # noqa: E402
from laws_ros.cli import parser  # noqa: E402
from laws_ros.core.safety import SOURCES  # noqa: E402

project, author, release = "laws_ros", "the authors of laws_ros", __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"laws_ros {release}"
html_show_copyright = False
NODES = ("controller", "learner", "cell", "simulator")
exclude_patterns = ["_build", "comparison"]  # what `laws bench` writes there
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]


def commands() -> str:
    """Each subcommand's own help."""
    (sub,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    page = "# Commands\n\nExit codes: 0 success, 1 the command's own check failed, 2 bad input (one line says what).\n"
    for name, command in sub.choices.items():
        page += f"\n## laws {name}\n\n```text\n{command.format_help().strip()}\n```\n"
    return page


def parameters() -> str:
    """What the nodes declare, as `ros2 param describe` would say it."""
    page = "# Parameters\n\nOf each node; a name that a node does not know is refused, not ignored.\n"
    for node in NODES:
        page += f"\n## {node}\n\n| parameter | default | meaning |\n| --- | --- | --- |\n"
        for p in import_module(f"laws_ros.nodes.{node}").PARAMETERS:
            default = "empty" if p.default == "" or hasattr(p.default, "name") else f"`{p.default}`"
            limits = "" if p.low is None else f" ({p.low:g} to {p.high:g})"
            page += f"| `{p.name}` | {default} | {p.description}{limits} |\n".replace("<", "&lt;")
    return page


def topics() -> str:
    """What the nodes say of themselves, from "Topics" on, and the columns of their rows."""
    page = "# Topics and services\n\nOf each node; names are relative to its namespace unless they begin with `/`.\n"
    for node in NODES:
        module = import_module(f"laws_ros.nodes.{node}")
        text = module.__doc__[module.__doc__.index("Topics") :]
        page += f"\n## {node}\n\n```text\n{text.strip()}\n```\n"
        if node == "controller":
            page += f"\nColumns of `~/decision`:\n\n```text\n{inspect.getdoc(module.columns)}\n```\n"
            page += f"\n`region`: {', '.join(f'{number} {source}' for number, source in SOURCES.items())}\n"
        if node == "simulator":
            page += f"\nColumns of `~/episode`: {', '.join(f'`{name}`' for name in module.COLUMNS)}\n"
    return page


def write_reference(app: Any) -> None:
    folder = DOCS / "reference"
    folder.mkdir(exist_ok=True)
    for write in (commands, parameters, topics):
        file, text = folder / f"{write.__name__}.md", write()
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def setup(app: Any) -> None:
    app.connect("builder-inited", write_reference)
