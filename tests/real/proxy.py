"""A proxy before a server on loopback that goes away: it cuts connections, or answers 503 to everything.

with Proxy("127.0.0.1:8333") as proxy:
    proxy.mode = "cut"
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Literal, Self

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Passes bytes on while `mode` is "pass".

    Attributes:
        mode: "pass"; "cut" closes every connection; "503" answers that to every request.
        refused: connections that were cut or answered 503.
    """

    def __init__(self, behind: str) -> None:
        host, _, port = behind.rpartition(":")
        self.behind = host, int(port)
        self.refused = 0
        self._mode: Literal["pass", "cut", "503"] = "pass"
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def address(self) -> str:
        """HTTP address of the proxy."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def mode(self) -> Literal["pass", "cut", "503"]:
        return self._mode

    @mode.setter
    def mode(self, mode: Literal["pass", "cut", "503"]) -> None:
        self._mode = mode
        if mode != "pass":
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.mode = "cut"
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._mode != "pass":
                self.refused += 1
                if self._mode == "503" and client.recv(1 << 16):
                    client.sendall(UNAVAILABLE)
                return
            with socket.create_connection(self.behind) as server:
                both = {client, server}
                self._open |= both
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()
                self._open -= both


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until either side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
