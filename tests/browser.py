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
    """One browser with one page of `width` x `height` CSS px. flags: further ones of the program. Use as a context
    manager."""

    def __init__(self, width: int = 1280, height: int = 900, *flags: str) -> None:
        self._size = (width, height)
        self._flags = flags
        self._count = 0
        self.faults: list[str] = []
        """What went wrong in pages: errors of scripts, breaches of the content security policy, failed requests."""

    def __enter__(self) -> Browser:
        program = chromium()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [program, *FLAGS, *self._flags, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._port()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS) as answer:
                page = next(each for each in json.load(answer) if each["type"] == "page")
            self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, proxy=None)
            self.resize(*self._size)
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
            self._note(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        """Keep what a message says about a fault in the page."""
        method, told = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.faults.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.faults.append(json.dumps(told["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.faults.append(f"a dialog: {told['message']}")
            self._count += 1
            closing = {"id": self._count, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            self._socket.send(json.dumps(closing))

    def watch(self) -> None:
        """Note faults of pages from now on, in `faults`. A dialog that a page opens is one."""
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def resize(self, width: int, height: int) -> None:
        """Give the page another size, in CSS px."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def key(self, name: str) -> None:
        """Press and release a key: a character, or a name such as `Enter`."""
        text = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", key=name)

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Where in the page a point of the first element of a selector is. x, y: from 0 (left, top) to 1."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        left, top, width, height = self.evaluate(f"(b => [b.left, b.top, b.width, b.height])({box})")
        return left + x * width, top + y * height

    def mouse(self, kind: str, at: tuple[float, float], **values: Any) -> None:
        """Send a mouse event (`mouseMoved`, `mousePressed`, `mouseReleased`, `mouseWheel`) at a place of the page."""
        button = "none" if kind in ("mouseMoved", "mouseWheel") else "left"
        self.command(
            "Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **{"button": button, "clickCount": 1, **values}
        )

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag with the left button pressed."""
        self.mouse("mouseMoved", start)
        self.mouse("mousePressed", start)
        for part in (0.5, 1):
            at = start[0] + part * (end[0] - start[0]), start[1] + part * (end[1] - start[1])
            self.mouse("mouseMoved", at, button="left", buttons=1)
        self.mouse("mouseReleased", end)

    def until(self, condition: str, seconds: float = 60) -> Any:
        """The value of a JavaScript expression (true: an element), as soon as it is true."""
        deadline = time.monotonic() + seconds
        plain = f"Promise.resolve({condition}).then(value => value instanceof Node || value)"
        while not (value := self.evaluate(plain)):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {condition}\n{self.text()[:3000]}"
            time.sleep(0.05)
        return value

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
