"""An HTTP server on loopback that serves files and misbehaves as it is told."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """faults: path -> what goes wrong, and how many times: `500`, `reset`, `stall`, `short` (less than was announced),
    `cut` (less, and announced so), `garbage`, `gone`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.asked = folder, dict[str, tuple[str, int]](), Counter[str]()
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked may have heard enough
                    server.answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing on the terminal."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.asked[name] += 1
        file = self.folder / name
        fault, times = self.faults.get(name, ("", 0))
        if times:
            self.faults[name] = (fault, times - 1)
        else:
            fault = ""
        if fault == "gone" or not file.is_file():
            request.send_error(404)
            return
        if fault == "500":
            request.send_error(500)
            return
        data = file.read_bytes()
        half = len(data) // 2 // 512 * 512
        if fault == "garbage":
            data = bytes(range(256)) * (len(data) // 256)
        elif fault == "cut":
            data = data[:half]
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if fault not in ("short", "reset", "stall"):
            request.wfile.write(data)
            return
        request.wfile.write(data[:half])
        request.wfile.flush()
        if fault == "stall":
            self.released.wait(60)
        request.close_connection = True
        if fault == "reset":
            time.sleep(0.1)  # what was sent has arrived
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(request.connection.detach())


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
