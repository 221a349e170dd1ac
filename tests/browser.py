"""A headless Chromium over its DevTools protocol: opens a page, waits for words on it, takes its image.

Nothing but loopback is spoken to: the browser's own services are switched off, and its profile is new and thrown away.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--proxy-server=direct://",
)
START_SECONDS = 60


def chromium() -> str | None:
    """The browser's program, or None if there is none here."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Browser:
    """One browser with one page of `width` x `height` CSS px. Use as a context manager."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._size = (width, height)
        self._count = 0

    def __enter__(self) -> Browser:
        program = chromium()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._port()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS) as answer:
                page = next(each for each in json.load(answer) if each["type"] == "page")
            self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None)
            width, height = self._size
            self.command(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._profile.cleanup()

    def _port(self) -> int:
        """The browser writes the port that it chose into its profile."""
        note = Path(self._profile.name) / "DevToolsActivePort"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "the browser did not start"
            if note.exists() and (lines := note.read_text().splitlines()):
                return int(lines[0])
            time.sleep(0.1)
        raise TimeoutError(f"the browser did not start within {START_SECONDS} s")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one DevTools command and wait for its answer."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        """Go to a page; its content may still be on its way."""
        self.command("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self) -> str:
        """What a reader of the page sees, without its images."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def click(self, words: str) -> None:
        """Click the link, button or tab that reads `words`, as soon as there is one."""
        same = f"e => e.innerText && e.innerText.trim() === {json.dumps(words)}"
        find = f"[...document.querySelectorAll('body *')].filter({same}).at(-1)"  # the innermost: clicks bubble up
        deadline = time.monotonic() + 60
        while not self.evaluate(f"Boolean({find})"):
            assert time.monotonic() < deadline, f"nothing to click that reads {words!r}:\n{self.text()[:3000]}"
            time.sleep(0.2)
        self.evaluate(f"{find}.click()")

    def wait_for(self, *words: str, seconds: float = 60) -> str:
        """The page's text, as soon as all `words` are in it."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.text()
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"{missing} not on the page after {seconds} s:\n{text[:3000]}"
            time.sleep(0.2)

    def settle(self, seconds: float = 3) -> None:
        """Let transitions and images come to rest: the page's text stays the same for `seconds`."""
        text, since = self.text(), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.2)
            if (now := self.text()) != text:
                text, since = now, time.monotonic()

    def screenshot(self, path: Path, *, quality: int = 80) -> None:
        """The visible part of the page, as JPEG (or PNG, by the file's name)."""
        options: dict[str, Any] = {"format": "png"} if path.suffix == ".png" else {"format": "jpeg", "quality": quality}
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", **options)["data"]))
