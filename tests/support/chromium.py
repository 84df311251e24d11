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

TINY_TEXT = """
(() => { const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const text = node.textContent.trim(), element = node.parentElement;
    if (!text || element.closest("title, .patch-word")) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    // A drawing that is scaled down scales its letters.
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const size = scale * parseFloat(getComputedStyle(element).fontSize);
    if (size < 10) found.push(`${text} ${size.toFixed(1)}px`);
  }
  return found; })()
"""
"""Texts smaller than 10 px on the screen; words on patches, which may be pushed aside, left out."""

PALE_TEXT = """
(() => { const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const parts = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  for (let node; (node = walker.nextNode()); ) {
    const text = node.textContent.trim(), element = node.parentElement;
    if (!text || element.closest("title, .patch-map, .grid")) continue;
    if (!element.getBoundingClientRect().width) continue;
    const style = getComputedStyle(element);
    let ground = element, behind = [255, 255, 255, 1].join();
    for (; ground; ground = ground.parentElement) {
      const colour = getComputedStyle(ground).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0) { behind = colour; break; }
    }
    const front = element.closest("svg") ? style.fill : style.color;
    const [high, low] = [light(front), light(behind)].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push(`${text.slice(0, 40)} ${contrast.toFixed(1)}`);
  }
  return found; })()
"""
"""Texts whose contrast to what is behind them is below 4.5, as WCAG's level AA asks."""

BROKEN_IMAGES = """
(async () => { const found = [];
  const sources = [...document.querySelectorAll("img")].map(image => image.src)
    .concat([...document.querySelectorAll("svg image")].map(image => image.href.baseVal));
  for (const source of sources) {
    const image = new Image(); image.src = source;
    try { await image.decode(); if (image.naturalWidth < 1) found.push(source.slice(0, 60)); }
    catch { found.push(source.slice(0, 60)); }
  }
  for (const image of document.querySelectorAll("img, svg.patch-map")) {
    const box = image.getBoundingClientRect();
    if (box.width < 32 || box.height < 16) found.push("small " + box.width + "x" + box.height);
  }
  return found; })()
"""
"""Pictures that a browser cannot show, or shows too small to see anything."""

FLAT_MARKS = """
[...document.querySelectorAll("mark")].filter(mark => {
  const own = getComputedStyle(mark).backgroundColor;
  const around = getComputedStyle(mark.parentElement).backgroundColor;
  const box = mark.getBoundingClientRect();
  return own === around || own === "rgba(0, 0, 0, 0)" || !box.width || !box.height;
}).length
"""
"""Marks that nobody would see."""

CUT_TEXT = """
[...document.querySelectorAll("h1, h2, h3, p, td, li, dt, dd, a, button, figcaption")]
  .filter(element => element.getBoundingClientRect().width)
  .filter(element => { const frame = element.closest(".scroll, .facet ul"); if (frame) return false;
    const box = element.getBoundingClientRect();
    return box.left < -0.5 || box.right > document.documentElement.clientWidth + 0.5; })
  .map(element => element.textContent.trim().slice(0, 40))
"""
"""Texts that reach beyond the window, frames that can be pushed sideways left out."""

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

    def assert_readable(self) -> None:
        """What a person would notice: nothing cut, tiny, pale, unmarked or broken."""
        assert self.complaints == []
        assert self.overflow() == 0
        for script in (CUT_TEXT, TINY_TEXT, PALE_TEXT, BROKEN_IMAGES):
            found = self.run(script)
            assert not found, found
        assert self.run(FLAT_MARKS) == 0

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
