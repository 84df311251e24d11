"""`vdr-db evaluate --sweep k`: tables of quality and cost over k, and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vdr_db.cli.show import show_comparison, show_text
from vdr_db.errors import require

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    from vdr_db.evaluation.quality import Quality, TestCollection
    from vdr_db.evaluation.sweep import SweepPoint

__all__ = ["ks_of", "plot_sweeps", "show_sweep", "sweep_figure"]

TOKENS = "tokens"
"""What a bag of tokens is called where a k stands otherwise."""
TABLES: dict[str, Callable[[SweepPoint], str]] = {
    "nDCG@10": lambda point: f"{point.ndcg_10:.3f}",
    "Recall@100": lambda point: f"{point.recall_100:.3f}",
    "FLOPS, multiplications for one query and document": lambda point: f"{point.flops:.2f}",
}
PANEL_INCHES = (6.0, 4.5)
DOTS_PER_INCH = 120


def ks_of(text: str) -> list[int]:
    """Numbers out of `8,16,32`, for argparse."""
    try:
        ks = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected numbers such as 8,16,32, got {text!r}"
        ) from error
    if min(ks) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers from 0 on, got {text!r}")
    return sorted(set(ks))


def show_sweep(
    collection: TestCollection, ranker: str, points: Sequence[SweepPoint], bm25: Quality | None
) -> None:
    """A table a measure: rows are query k, columns document k; mean weights at the edges."""
    show_text(
        f"{collection.name}: {len(collection.documents):,} documents, "
        f"{len(collection.queries):,} judged queries, {Path(ranker).name}"
    )
    if bm25 is not None:
        show_text(f"BM25: nDCG@10 {bm25.ndcg_10:.3f}, Recall@100 {bm25.recall_100:.3f}")
    if any(None in (point.query_k, point.document_k) for point in points):
        show_text(f"{TOKENS}: a bag of tokens instead of a vector, mode alpha or beta")
    documents = {point.document_k: point.document_nonzeros for point in points}
    queries: dict[int | None, float] = {}
    for point in sorted(points, key=lambda point: (point.query_k is None, point.query_k)):
        queries[point.query_k] = point.query_nonzeros
    columns = ["query k", "weights", *(f"doc {_name(k)}" for k in documents)]
    for title, cell in TABLES.items():
        cells = {(point.query_k, point.document_k): cell(point) for point in points}
        rows = [
            {
                "query k": _name(query_k),
                "weights": f"{weights:.1f}",
                **{f"doc {_name(k)}": cells.get((query_k, k)) for k in documents},
            }
            for query_k, weights in queries.items()
        ]
        rows.append(
            {
                "query k": "weights",
                "weights": "",
                **{f"doc {_name(k)}": f"{weights:.1f}" for k, weights in documents.items()},
            }
        )
        show_text("")
        show_comparison(columns, rows, title)


def plot_sweeps(
    sweeps: Sequence[tuple[str, Sequence[SweepPoint], Quality | None]], path: Path
) -> None:
    """Draws nDCG@10 over FLOPS, a curve for each document k, a panel for each collection.

    A sweep is the name of a collection, its points, and BM25 on it or None; the ending of `path`
    says the kind of drawing. Needs matplotlib.
    """
    sweep_figure(sweeps).savefig(path)


def sweep_figure(sweeps: Sequence[tuple[str, Sequence[SweepPoint], Quality | None]]) -> Figure:
    """The drawing of `plot_sweeps`."""
    require("matplotlib", "train")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    width, height = PANEL_INCHES
    figure = Figure((width * len(sweeps), height), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    labelled: dict[str, Artist] = {}
    for axis, (name, points, bm25) in zip(panels, sweeps, strict=True):
        for document_k in dict.fromkeys(point.document_k for point in points):
            own = [point for point in points if point.document_k == document_k]
            curve = [point for point in own if point.query_k is not None]
            colour = None
            if curve:
                xs, ys = [point.flops for point in curve], [point.ndcg_10 for point in curve]
                label = f"document {_name(document_k)}"
                (line,) = axis.plot(xs, ys, marker=".", label=label)
                colour = line.get_color()
            for point in own:
                if point.query_k is None:
                    axis.plot(point.flops, point.ndcg_10, "*", color=colour, markersize=9)
        if bm25 is not None:
            axis.axhline(bm25.ndcg_10, color="grey", linestyle=":", label="BM25")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(name, wrap=True)
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    panels[0].set_ylabel("nDCG@10")
    # One label and one legend for all panels, outside: inside they would lie on each other.
    figure.supxlabel("multiplications for a query and a document; points: query k", fontsize=9)
    if labelled:
        columns = 2 * len(sweeps)
        figure.legend(
            labelled.values(), labelled, fontsize=8, ncols=columns, loc="outside upper center"
        )
    return figure


def _name(k: int | None) -> str:
    return TOKENS if k is None else str(k)
