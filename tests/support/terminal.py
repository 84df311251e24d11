"""A terminal made of a list of cells: what a program wrote to it, and the pictures it would show.

Written from the protocols' own descriptions; nothing here knows the library under test.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SEQUENCES = re.compile(
    rb"\x1b_G(?P<kitty>[^\x1b]*)\x1b\\"
    rb"|\x1b\](?P<osc>[^\x07\x1b]*)(?:\x07|\x1b\\)"
    rb"|\x1bP(?P<dcs>[^\x1b]*)\x1b\\"
    rb"|\x1b\[(?P<csi>[0-9;?]*)(?P<final>[A-Za-z])"
    rb"|\x1b(?P<single>[78])"
    rb"|(?P<text>[^\x1b]+)"
)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shown:
    """A picture in a terminal.

    Attributes:
        way: Protocol it came by.
        row: Of its upper left cell.
        column: Of the same.
        size: Columns and rows of cells, or None where pixels say it.
        pixels: `[height, width, 3 or 4]` uint8.
    """

    way: str
    row: int
    column: int
    size: tuple[int, int] | None
    pixels: np.ndarray


@dataclass
class Screen:
    """What bytes do to a terminal that is high enough never to scroll."""

    pictures: list[Shown] = field(default_factory=list)
    cells: dict[tuple[int, int], tuple[str, Colour | None, Colour | None]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, written: bytes) -> Screen:
        screen = cls()
        row = column = 0
        saved = (0, 0)
        front: Colour | None = None
        back: Colour | None = None
        kitty: dict[bytes, bytes] = {}
        collected = b""
        at = 0
        while at < len(written):
            found = _SEQUENCES.match(written, at)
            assert found, written[at : at + 40]
            at = found.end()
            if found["text"] is not None:
                for letter in found["text"].decode():
                    if letter == "\n":
                        row += 1
                    elif letter == "\r":
                        column = 0
                    else:
                        screen.cells[row, column] = (letter, front, back)
                        column += 1
            elif found["single"]:
                if found["single"] == b"7":
                    saved = (row, column)
                else:
                    row, column = saved
            elif found["final"] == b"A":
                row -= int(found["csi"])
                assert row >= 0
            elif found["final"] == b"C":
                column += int(found["csi"])
            elif found["final"] == b"m":
                front, back = _colours(found["csi"], front, back)
            elif found["kitty"] is not None:
                control, _, data = found["kitty"].partition(b";")
                keys = dict(pair.split(b"=") for pair in control.split(b","))
                kitty = kitty or keys
                assert len(data) <= 4096
                collected += data
                if keys[b"m"] == b"0":
                    assert (kitty[b"a"], kitty[b"f"], kitty[b"C"]) == (b"T", b"100", b"1")
                    assert kitty[b"q"] == b"2", "no answer that a shell would take for typing"
                    size = (int(kitty[b"c"]), int(kitty[b"r"]))
                    pixels = _png(base64.b64decode(collected, validate=True))
                    screen.pictures.append(Shown("kitty", row, column, size, pixels))
                    kitty, collected = {}, b""
            elif found["osc"] is not None:
                screen.pictures.append(_inline_image(found["osc"], row, column))
            elif found["dcs"] is not None:
                screen.pictures.append(Shown("sixel", row, column, None, sixels(found["dcs"])))
        return screen

    def text(self) -> list[str]:
        """Lines of letters, what was stepped over as spaces."""
        height = 1 + max((row for row, _ in self.cells), default=-1)
        lines = []
        for row in range(height):
            columns = [column for r, column in self.cells if r == row]
            width = 1 + max(columns, default=-1)
            lines.append("".join(self.cells.get((row, c), (" ",))[0] for c in range(width)))
        return lines

    def blocks(self, row: int, columns: int, rows: int) -> np.ndarray:
        """`[2 * rows, columns, 4]` pixels of half blocks at the left edge; clear where none is."""
        pixels = np.zeros((2 * rows, columns, 4), np.uint8)
        for r in range(rows):
            for c in range(columns):
                letter, front, back = self.cells.get((row + r, c), (" ", None, None))
                upper, lower = {"▀": (front, back), "▄": (back, front)}.get(letter, (back, back))
                for y, colour in ((2 * r, upper), (2 * r + 1, lower)):
                    if colour is not None:
                        pixels[y, c] = (*colour, 255)
        return pixels


def sixels(data: bytes) -> np.ndarray:
    """The pixels of a sixel picture, `[height, width, 3]`; what is not drawn is white."""
    _, _, body = data.partition(b"q")
    found = re.match(rb'"1;1;(\d+);(\d+)', body)
    assert found
    width, height = int(found[1]), int(found[2])
    pixels = np.full((height, width, 3), 255, np.uint8)
    colours: dict[int, Colour] = {}
    colour, x, y = 0, 0, 0
    for token in re.finditer(rb"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|.", body[found.end() :]):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                shares = (int(token[2]), int(token[3]), int(token[4]))
                assert max(shares) <= 100
                colours[colour] = tuple(round(255 * share / 100) for share in shares)
            continue
        count, letter = (int(token[5]), token[6]) if token[5] else (1, token[0])
        if letter == b"$":
            x = 0
        elif letter == b"-":
            x, y = 0, y + 6
        else:
            bits = letter[0] - 63
            assert 0 <= bits < 64
            for bit in range(6):
                if bits >> bit & 1:
                    pixels[y + bit, x : x + count] = colours[colour]
            x += count
    return pixels


@contextmanager
def terminal(monkeypatch: Any, *, columns: int = 110, **variables: str) -> Iterator[bytearray]:
    """Puts a terminal in the place of stdout; yields what is written to it, complete at the end.

    Args:
        monkeypatch: Of pytest.
        columns: Its width.
        variables: The only ones of the environment that say something about terminals.
    """
    import fcntl
    import pty
    import termios

    known = ("TERM", "COLORTERM", "NO_COLOR", "KITTY_WINDOW_ID", "TERM_PROGRAM", "LC_TERMINAL")
    for name in (*known, "TMUX", "STY", "COLUMNS", "LINES", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # Libraries ask the descriptor 1 for the width, which stays what it was.
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, columns, 0, 0))
    written = bytearray()

    def collect() -> None:
        while True:
            try:
                read = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                return
            if not read:
                return
            written.extend(read)

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    with monkeypatch.context() as patch, os.fdopen(theirs, "w", encoding="utf-8") as stdout:
        patch.setattr("sys.stdout", stdout)
        yield written
    reader.join(timeout=30)
    os.close(ours)


def _colours(
    given: bytes, front: Colour | None, back: Colour | None
) -> tuple[Colour | None, Colour | None]:
    numbers = [int(number or 0) for number in given.split(b";")]
    while numbers:
        first = numbers.pop(0)
        if first == 0:
            front = back = None
        elif first in (38, 48) and numbers[:1] == [2]:
            colour = (numbers[1], numbers[2], numbers[3])
            del numbers[:4]
            front, back = (colour, back) if first == 38 else (front, colour)
        elif first in (38, 48):
            del numbers[:2]
    return front, back


def _inline_image(osc: bytes, row: int, column: int) -> Shown:
    head, _, data = osc.partition(b":")
    assert head.startswith(b"1337;File=")
    keys = dict(pair.split(b"=") for pair in head.removeprefix(b"1337;File=").split(b";"))
    content = base64.b64decode(data, validate=True)
    assert int(keys[b"size"]) == len(content)
    assert (keys[b"inline"], keys[b"preserveAspectRatio"]) == (b"1", b"1")
    size = (int(keys[b"width"]), int(keys[b"height"]))
    return Shown("iterm2", row, column, size, _png(content))


def _png(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image)
