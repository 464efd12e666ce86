"""One file with all that a robot needs, and its installation: an atomic switch that can be undone.

A bundle is a zip archive of the policy, its card, the library and the configuration, stored uncompressed in a fixed
order with fixed times (the same content gives the same bytes), and `manifest.json` with the sha256 of each.

    FOLDER/releases/<digest>/...   one folder per installed bundle, never changed
    FOLDER/current -> releases/<digest>          switched by renaming a link over it
    FOLDER/previous -> releases/<digest>         what `roll_back` returns to
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import laws_ros
from laws_ros.core import durable
from laws_ros.core.errors import LibraryError

from .cached_policy import CachedPolicy, open_pair

FORMAT = 1
_MOST = 2**31  # bytes; no bundle claims more
_NAMES = ("policy.onnx", "policy.yaml", "library.laws", "config.yaml")


def bundle(
    library: str | Path, policy: str | Path, out: str | Path, config: str | Path | None = None
) -> dict[str, Any]:
    """Write a bundle; returns its manifest.

    Raises:
        LawsError: a file is missing or damaged, the library is not this policy's, or `out` cannot be written.
    """
    opened, model = open_pair(library, policy)
    files = {"policy.onnx": Path(policy).read_bytes(), "library.laws": Path(library).read_bytes()}
    card = Path(policy).with_suffix(".yaml")
    if card.is_file():
        files["policy.yaml"] = card.read_bytes()
    if config is not None:
        try:
            files["config.yaml"] = Path(config).read_bytes()
        except OSError as error:
            raise LibraryError(f"{config}: cannot be read: {error.strerror}") from None
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    manifest = {
        "format": FORMAT,
        "laws_ros": laws_ros.__version__,
        "name": model.card.name,
        "policy_sha256": model.sha256,
        "library_digest": opened.digest,
        "precision": opened.precision,
        "regions": len(opened),
        "files": listed,
    }
    out = Path(out)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in (("manifest.json", json.dumps(manifest, indent=2).encode()), *sorted(files.items())):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    try:
        durable.write(out, content.getvalue())
    except OSError as error:
        raise LibraryError(f"{out}: cannot be written: {error.strerror}") from None
    return manifest


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the files of a bundle.

    Raises:
        LibraryError: missing, not a bundle, of another format, or any byte differs from what the manifest says.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(info.file_size > _MOST for info in archive.infolist()):
                raise LibraryError(f"{path}: claims a file of more than {_MOST} bytes")
            manifest = json.loads(archive.read("manifest.json"))
            listed = manifest["files"]
            if manifest["format"] != FORMAT:
                raise LibraryError(f"{path}: bundle format {manifest['format']}, this program reads {FORMAT}")
            if sorted(names) != sorted(["manifest.json", *listed]) or not set(listed) <= set(_NAMES):
                raise LibraryError(f"{path}: its files are not those that its manifest lists")
            files = {name: archive.read(name) for name in listed}
    except OSError as error:
        raise LibraryError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise LibraryError(f"{path}: not a whole bundle ({error}); make or fetch it again") from None
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != listed[name]["sha256"]:
            raise LibraryError(f"{path}: {name} is not what the manifest says; make or fetch the bundle again")
    return manifest, files


def install(path: str | Path, folder: str | Path) -> Path:
    """Unpack a bundle, try it, and switch to it; what runs from `folder/current` changes in one step or not at all.

    Returns:
        The release's folder.

    Raises:
        LawsError: a damaged bundle, or its library and policy do not open together; the old release stays current.
    """
    manifest, files = read(path)
    folder = Path(folder)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]
    release = folder / "releases" / digest
    try:
        if not release.is_dir():
            release.parent.mkdir(parents=True, exist_ok=True)
            for left in release.parent.glob(".new.*"):  # by an installation that was killed
                if time.time() - left.stat().st_mtime > 3600.0:
                    shutil.rmtree(left, ignore_errors=True)
            unpacked = Path(tempfile.mkdtemp(prefix=".new.", dir=release.parent))
            try:
                for name, data in {**files, "manifest.json": json.dumps(manifest, indent=2).encode()}.items():
                    durable.write(unpacked / name, data)
                CachedPolicy.open(unpacked / "library.laws", unpacked / "policy.onnx")  # before anything switches
                os.chmod(unpacked, 0o755)
                os.rename(unpacked, release)
            finally:
                shutil.rmtree(unpacked, ignore_errors=True)
        current = folder / "current"
        if current.is_symlink() and os.readlink(current) != f"releases/{digest}":
            _point(folder / "previous", os.readlink(current))
        _point(current, f"releases/{digest}")
    except OSError as error:
        raise LibraryError(f"{folder}: cannot be installed to: {error.strerror}") from None
    return release


def roll_back(folder: str | Path) -> Path:
    """Make the release before the current one current again.

    Raises:
        LibraryError: there is none.
    """
    folder = Path(folder)
    if not (folder / "previous").is_symlink():
        raise LibraryError(f"{folder}: no earlier release to go back to")
    target = os.readlink(folder / "previous")
    if not (folder / target).is_dir():
        raise LibraryError(f"{folder}: the earlier release {target} is gone")
    _point(folder / "current", target)
    return folder / target


def _point(link: Path, target: str) -> None:
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    os.symlink(target, new)
    os.replace(new, link)
    durable.synchronise(link.parent)
