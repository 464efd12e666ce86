"""systemd's notify protocol (sd_notify(3)): a unit of Type=notify learns when a node is up, alive, and on its way out.

Without NOTIFY_SOCKET, that is when systemd did not start this process, nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import socket

READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


def tell(state: str) -> None:
    """Send one of the states above; who does not listen misses it, and nobody waits."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(state.encode(), f"\0{path[1:]}" if path.startswith("@") else path)
