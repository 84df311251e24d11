"""A headless Chromium, driven through its debugging pipe: real pages, clicked and measured."""

from __future__ import annotations

import base64
import itertools
import json
import os
import selectors
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 120
DESKTOP, PHONE = (1280, 900), (390, 844)

OVERLAPS = """
(() => { const boxes = [...document.querySelectorAll("svg.cloud")].map(cloud =>
  [...cloud.querySelectorAll("text")].map(text => text.getBoundingClientRect()));
  let found = 0;
  for (const cloud of boxes) for (let i = 0; i < cloud.length; i++) for (let j = 0; j < i; j++) {
    const a = cloud[i], b = cloud[j];
    // Line boxes have room above and below the letters; letters take up the middle.
    const trim = box => [box.top + 0.16 * box.height, box.bottom - 0.16 * box.height];
    const [at, ab] = trim(a), [bt, bb] = trim(b);
    if (a.left < b.right && b.left < a.right && at < bb && bt < ab) found++;
  }
  return found; })()
"""
"""Pairs of words of a cloud that lie on each other."""

RIGHT_EDGES = """
[...document.querySelectorAll("table")].map(table => new Set([...table.querySelectorAll("tr")]
  .map(row => [...row.querySelectorAll("td.number")].pop()).filter(cell => cell && cell.textContent)
  .map(cell => { const range = document.createRange(); range.selectNodeContents(cell);
    return Math.round(range.getBoundingClientRect().right); })).size)
"""
"""For each table, how many right edges the last numbers of its rows have."""

ABSENT = "no Chromium here: install the Debian package `chromium`"


def find_chromium() -> str | None:
    """Path of the browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser of its own; close it."""

    def __init__(self, profile: Path) -> None:
        command = [
            str(find_chromium()),
            "--headless",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            # The sandbox does not start for root, who runs containers.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ]
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        # The browser speaks on 3 and 4; which numbers are free here is not known.
        line = f"exec {shlex.join(command)} 3<&{their_in} 4>&{their_out}"
        self._process = subprocess.Popen(
            ["bash", "-c", line],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self.requested: list[str] = []
        self.resize(DESKTOP)

    def resize(self, size: tuple[int, int]) -> None:
        width, height = size
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def open(self, url: str) -> None:
        """Goes to a page and waits until it is there."""
        self.complaints.clear()
        self.requested.clear()
        answer = self._ask("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        self._wait("Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        """Writes into a field and presses Enter; waits for the next page."""
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self._ask("Input.insertText", text=text)
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **key)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **key)
        self._wait("Page.loadEventFired")

    def click(self, selector: str) -> None:
        """Clicks what a selector finds first; waits for the next page."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        self._wait("Page.loadEventFired")

    def upload(self, selector: str, file: Path) -> None:
        """Chooses a file in a field."""
        root = self._ask("DOM.getDocument")["root"]["nodeId"]
        node = self._ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._ask("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, path: Path) -> Path:
        """The whole page as PNG."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def overflow(self) -> int:
        """How many pixels the page is wider than the window."""
        return int(
            self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        )

    def close(self) -> None:
        try:
            self._session = None
            self._ask("Browser.close")
            self._process.wait(timeout=30)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(deadline)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def _wait(self, event: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._next(deadline)
            self._note(answer)
            if answer.get("method") == event:
                return

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["level"] in ("error", "warning"):
                self.complaints.append(entry["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            with selectors.DefaultSelector() as selector:
                selector.register(self._in, selectors.EVENT_READ)
                ready = selector.select(max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._in, 1 << 20)
            assert read, "the browser has ended"
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))
