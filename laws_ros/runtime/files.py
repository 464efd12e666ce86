"""Where this project's files lie, in a source checkout and installed, and how they are read.

The package's data (models, simulations, configurations, launch files) lie beside package.xml in a checkout and in
share/laws_ros below the prefix that pip or colcon installed to.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import yaml

from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def share_path(relative: str | os.PathLike[str] = "") -> Path:
    """The path of one of the package's own data files, such as "models/cartpole.onnx" (it may not exist)."""
    checkout = _PACKAGE.parent
    if (checkout / "package.xml").is_file():
        return checkout / relative
    for prefix in _PACKAGE.parents:
        share = prefix / "share" / _PACKAGE.name
        if share.is_dir():
            return share / relative
    raise ConfigError(f"{_PACKAGE}: no share/{_PACKAGE.name} in any folder above it; install the package again")


def resolve(path: str | os.PathLike[str]) -> Path:
    """The file that a user's path means: absolute, or relative to the working folder, or else to the package's data.

    A path that exists nowhere comes back as it was given, for the reader's message.
    """
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given
    shared = share_path(given)
    return shared if shared.exists() else given


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or is something other than a mapping.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: {where}not valid YAML: {problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file's top level is {type(data).__name__}, a mapping is needed")
    return data


def load_card(onnx_path: str | os.PathLike[str]) -> Card:
    """Read the card P.yaml that lies beside a policy P.onnx.

    Raises:
        ConfigError: the card is missing or no YAML mapping.
        CardError: it is no valid card.
    """
    path = Path(onnx_path).with_suffix(".yaml")
    return Card.from_dict(load_yaml(path), str(path))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
