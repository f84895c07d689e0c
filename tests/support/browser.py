"""A page in headless Chromium: what it complains of, asks the network for, and shows.

Chromium is driven by its DevTools protocol over two pipes: JSON messages, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60.0  # for one answer; a busy machine starts the browser slowly
_QUIET = 0.3  # seconds without news after which a page has said what it had to say
_FREE = 20  # file descriptors from here on: 3 and 4 are the browser's
_IMAGES = """Promise.all([...document.images].map(image => image.decode().catch(() => {}))).then(() =>
    [...document.images].map(image => ({source: image.src.slice(0, 80), width: image.naturalWidth, alt: image.alt})))"""


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


@dataclass
class Seen:
    """errors: console errors, exceptions, faults of the browser's log. requests: addresses asked for, other than the
    page itself and data in it. images: {source, width, alt} of each, width 0 where it did not load. overflow: pixels by
    which the page is wider than its window."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    overflow: int = 0

    def problems(self) -> list[str]:
        """One line for each thing that a page that stands by itself must not do."""
        broken = [f"image not loaded: {image['source']}" for image in self.images if not image["width"]]
        unnamed = [f"image without alt: {image['source']}" for image in self.images if not image["alt"].strip()]
        wide = [f"page {self.overflow} pixels wider than its window"] if self.overflow > 0 else []
        errors, requests = [f"console: {e}" for e in self.errors], [f"request: {r}" for r in self.requests]
        return errors + requests + broken + unnamed + wide


class Browser:
    """One Chromium with an own, temporary profile; a context manager."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FREE) for fd in (theirs_in, theirs_out)]
        log = os.open(Path(self._profile.name, "log"), os.O_WRONLY | os.O_CREAT)
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                   f"--user-data-dir={self._profile.name}/profile", "--remote-debugging-pipe"]  # fmt: skip
        self._pid = os.posix_spawn(
            executable,
            [executable, *options, "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setpgroup=0,
        )
        for fd in (theirs_in, theirs_out, log, *high):
            os.close(fd)
        self._number, self._buffer = 0, b""
        self._news: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._out)  # at which it ends by itself; what is left of its group after that is ended
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            time.sleep(0.05)
        try:
            os.killpg(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._in)
        self._profile.cleanup()

    def look(
        self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, picture: Path | None = None
    ) -> Seen:
        """Open the file in a window of its own. picture: where to save a PNG of the whole page."""
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]

        def ask(method: str, **parameters: Any) -> dict[str, Any]:
            return self._ask(method, parameters, session)

        for room in ("Page", "Runtime", "Log", "Network"):
            ask(f"{room}.enable")
        ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        ask("Emulation.setEmulatedMedia", features=[scheme])
        address = page.resolve().as_uri()
        self._news.clear()
        ask("Page.navigate", url=address)
        self._until(lambda message: message.get("method") == "Page.loadEventFired")
        images = self._value(ask, _IMAGES)
        overflow = self._value(ask, "document.documentElement.scrollWidth - window.innerWidth")
        while self._read(_QUIET):
            pass
        if picture:
            whole = ask("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": width, "height": min(whole["height"], 16000), "scale": 1}
            shot = ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            picture.write_bytes(base64.b64decode(shot["data"]))
        seen = _told([message for message in self._news if message.get("sessionId") == session], address)
        self._ask("Target.closeTarget", {"targetId": target})
        return Seen(seen.errors, seen.requests, images, overflow)

    @staticmethod
    def _value(ask: Callable[..., dict[str, Any]], expression: str) -> Any:
        answer = ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return answer["result"]["value"]

    def _ask(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda message: message.get("id") == number)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first such message, among those not yet looked at for an answer and those to come."""
        deadline, looked = time.monotonic() + _SECONDS, 0
        while True:
            for message in self._news[looked:]:
                looked += 1
                if wanted(message):
                    return message
            if not self._read(deadline - time.monotonic()):
                log = Path(self._profile.name, "log").read_text(errors="replace")
                raise TimeoutError(f"the browser did not answer; its log ends: {log[-2000:]}")

    def _read(self, seconds: float) -> bool:
        """Take in what there is to read; whether there was anything within so many seconds."""
        if not select.select([self._in], [], [], max(seconds, 0))[0]:
            return False
        part = os.read(self._in, 1 << 20)
        *messages, self._buffer = (self._buffer + part).split(b"\0")
        self._news += map(json.loads, messages)
        return bool(part)


def _told(news: list[dict[str, Any]], page: str) -> Seen:
    seen = Seen()
    for message in news:
        said, method = message.get("params", {}), message.get("method")
        if method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert", "warning"):
            seen.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in said["args"]))
        elif method == "Runtime.exceptionThrown":
            seen.errors.append(said["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            seen.errors.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = said["request"]["url"]
            if address != page and not address.startswith("data:"):
                seen.requests.append(address)
    return seen
