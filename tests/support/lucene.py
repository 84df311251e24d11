"""Scores from Lucene itself: a small Java program over the Debian package `liblucene8-java`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np

from vdr_db import SparseRows

JAVA_FOLDER = Path(__file__).parents[1] / "java"
JAR_FOLDER = Path("/usr/share/java")


def core_jar() -> Path | None:
    """The core jar of Lucene 8, whose encoding of features later versions kept."""
    return max(JAR_FOLDER.glob("lucene-core-8.*.jar"), default=None)


def why_missing() -> str | None:
    """Why Lucene cannot be asked here, or `None` when it can."""
    if shutil.which("javac") is None or shutil.which("java") is None:
        return "no JDK: install a package that brings javac, such as openjdk-17-jdk-headless"
    if core_jar() is None:
        return "no Lucene: apt-get install liblucene8-java"
    return None


def build(folder: Path) -> Path:
    """Compiles the program into `folder`."""
    source = JAVA_FOLDER / "FeatureScores.java"
    command = ["javac", "-nowarn", "-cp", str(core_jar()), "-d", str(folder), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return folder


def search(
    classes: Path, documents: SparseRows, queries: SparseRows, folder: Path
) -> list[list[tuple[int, float]]]:
    """For each query every matching document with its score, in Lucene's order."""
    parts = [np.array([len(documents), len(queries)], "<i4").tobytes()]
    for rows in (documents, queries):
        for number in range(len(rows)):
            ids, weights = rows.row(number)
            parts += [np.array([ids.size], "<i4").tobytes(), ids.astype("<i4").tobytes()]
            parts.append(weights.astype("<f4").tobytes())
    given, wanted = folder / "rows.bin", folder / "hits.bin"
    given.write_bytes(b"".join(parts))
    path = f"{classes}:{core_jar()}"
    command = ["java", "-Xmx512m", "-cp", path, "FeatureScores", str(given), str(wanted)]
    subprocess.run(command, check=True, timeout=120)
    words = np.frombuffer(wanted.read_bytes(), "<i4")
    result = []
    at = 0
    for _ in range(len(queries)):
        hits = words[at + 1 : at + 1 + 2 * words[at]].reshape(-1, 2)
        at += 1 + 2 * int(words[at])
        scores = np.ascontiguousarray(hits[:, 1]).view("<f4")
        result.append(list(zip(hits[:, 0].tolist(), scores.tolist(), strict=True)))
    return result
