"""A terminal made of a list of cells: what a program wrote to it, with the colours of each letter.

Nothing here knows the library under test.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SEQUENCES = re.compile(rb"\x1b\[(?P<csi>[0-9;?]*)(?P<final>[A-Za-z])|(?P<text>[^\x1b]+)")

Colour = tuple[int, int, int]


@dataclass
class Screen:
    """What bytes do to a terminal that is high enough never to scroll."""

    cells: dict[tuple[int, int], tuple[str, Colour | None, Colour | None]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, written: bytes) -> Screen:
        screen = cls()
        row = column = 0
        front: Colour | None = None
        back: Colour | None = None
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
            elif found["final"] == b"m":
                front, back = _colours(found["csi"], front, back)
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

    def letters(self) -> set[str]:
        """Every letter that stands somewhere."""
        return {letter for letter, _, _ in self.cells.values()}

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
