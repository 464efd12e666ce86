"""Where a fleet's files lie: any store that fsspec reaches, of which nothing is believed.

A directory, S3-compatible storage (with `s3fs`), HTTP (with `aiohttp`, for reading) and whatever else fsspec knows.
All reading is bounded. In a directory, a file is there whole or not at all; object stores promise that themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient import FetcherInterface

from laws_ros.core import durable
from laws_ros.core.errors import FleetError, RefusedError

_BLOCK = 1 << 16


class Store:
    """Files by their names below one address.

    Args:
        url: a folder, or what fsspec understands: s3://bucket/fleet, https://host/fleet, ...

    Raises:
        FleetError: an address that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._system, self._root = fsspec.core.url_to_fs(os.path.expanduser(url))
        except (ValueError, ImportError, OSError) as error:
            raise FleetError(f"store {url}: {error}") from None

    def read(self, name: str, most: int) -> bytes | None:
        """A file of at most `most` bytes, None if there is none.

        Raises:
            RefusedError: it is larger. FleetError: the store does not answer.
        """
        data = bytearray()
        try:
            for block in self.blocks(name):
                data += block
                if len(data) > most:
                    raise RefusedError(f"store {self.url}: {name} has more than {most} bytes, which is the limit")
        except FileNotFoundError:
            return None
        return bytes(data)

    def blocks(self, name: str) -> Iterator[bytes]:
        """A file's content, block by block.

        Raises:
            FileNotFoundError: there is none. FleetError: the store does not answer.
        """
        with self._answering("read"), self._system.open(f"{self._root}/{name}", "rb") as stream:
            while block := stream.read(_BLOCK):
                yield block

    def write(self, name: str, data: bytes) -> None:
        """Store a file, over an older one.

        Raises:
            FleetError: the store does not answer, or cannot be written.
        """
        path = f"{self._root}/{name}"
        with self._answering("written"):
            if isinstance(self._system, LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                durable.write(Path(path), data)
            else:
                self._system.pipe_file(path, data)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            FleetError: the store does not answer, or cannot be written.
        """
        with self._answering("written"):
            try:
                self._system.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return

    @contextmanager
    def _answering(self, wanted: str) -> Iterator[None]:
        try:
            yield
        except (FleetError, GeneratorExit):
            raise
        except FileNotFoundError as error:
            # fsspec's HTTP raises this, too, where nobody answers
            cause = error.__cause__
            missing = cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404
            if missing and wanted == "read":
                raise
            raise FleetError(f"store {self.url}: cannot be {wanted}: {cause or error}") from None
        except NotImplementedError:
            raise FleetError(f"store {self.url}: cannot be {wanted} by this protocol") from None
        except Exception as error:  # every back end has errors of its own
            what = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise FleetError(f"store {self.url}: cannot be {wanted}: {what}") from None


class Fetcher(FetcherInterface):
    """How python-tuf's client reads a store: its addresses are the names of files there."""

    def __init__(self, store: Store) -> None:
        self.store, self.bytes = store, 0

    def _fetch(self, url: str) -> Iterator[bytes]:
        blocks = self.store.blocks(url)
        try:
            first = next(blocks, b"")
        except FileNotFoundError:
            raise DownloadHTTPError(f"store {self.store.url}: has no {url}", 404) from None
        except FleetError as error:
            raise DownloadError(str(error)) from None
        return self._rest(first, blocks)

    def _rest(self, first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
        self.bytes += len(first)
        yield first
        try:
            for block in blocks:
                self.bytes += len(block)
                yield block
        except (FleetError, FileNotFoundError) as error:
            raise DownloadError(str(error)) from None
