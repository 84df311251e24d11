"""Batches of training examples: streamed, mixed, shuffled, bucketed by length.

The order of examples is a function of files, options, seed and epoch alone. All ranks walk the same
stream of global batches and keep their own slice, so the number of ranks does not change what is
learnt, and a resumed run skips to its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from vdr_db.errors import ConfigError, InputError
from vdr_db.training.examples import Example, Source, read_examples

__all__ = ["Batch", "Batches", "make_batch"]


@dataclass(frozen=True)
class Batch:
    """One step's examples of one rank.

    Attributes:
        queries: N texts.
        documents: N positives, then the negatives query by query, `negatives` each.
        negatives: Of each query.
        scores: `[N, 1 + negatives]` float32 teacher scores, NaN for queries without; None when no
            query has any.
    """

    queries: list[str]
    documents: list[str]
    negatives: int
    scores: np.ndarray[Any, np.dtype[np.float32]] | None


@dataclass
class Batches:
    """Global batches of several sources, epoch after epoch.

    Attributes:
        sources: Where examples come from.
        batch_size: Queries of a global batch, over all ranks.
        negatives: Hard negatives of each query.
        seed: Of shuffling and sampling.
        buffer: Examples held for shuffling; 0 keeps file order.
        bucket: Batches that are sorted by length together; 1 turns it off.
        on_bad: `"raise"` on a bad line, or `"skip"` and count it.
        skipped: How many bad examples were left out so far.
    """

    sources: Sequence[Source]
    batch_size: int
    negatives: int = 0
    seed: int = 0
    buffer: int = 20_000
    bucket: int = 16
    on_bad: Literal["raise", "skip"] = "raise"
    skipped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be a stream."""
        if not self.sources:
            raise ConfigError("`data.train` must name at least one file, got none.")
        if self.batch_size < 1 or self.negatives < 0 or self.buffer < 0 or self.bucket < 1:
            raise ConfigError(
                "`batch_size` and `bucket` must be at least 1, `negatives` and `buffer` at least "
                f"0, got {self.batch_size}, {self.bucket}, {self.negatives} and {self.buffer}."
            )
        if any(not source.weight > 0 for source in self.sources):
            raise ConfigError("the `weight` of every training file must be above 0.")

    def epoch(self, number: int, *, skip: int = 0) -> Iterator[list[Example]]:
        """Full batches of one epoch; the rest that does not fill a batch is left out.

        An epoch ends when its sources do. Sources are interleaved example by example. The first
        `skip` batches are left out. Each example has exactly `negatives` negatives.

        Raises:
            InputError: A bad line with `on_bad="raise"`, or not a single full batch.
        """
        rng = np.random.default_rng([self.seed, number])
        self.skipped = 0
        made = 0
        examples = self._shuffled(self._mixed(rng), rng)
        while group := list(islice(examples, self.batch_size * self.bucket)):
            if self.bucket > 1:
                group.sort(key=_length)
            batches = [
                group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)
            ]
            for i in rng.permutation(len(batches)) if self.bucket > 1 else range(len(batches)):
                if len(batches[i]) < self.batch_size:
                    continue
                # Sampling takes random numbers, so it is done for skipped batches too.
                sampled = [self._sampled(example, rng) for example in batches[i]]
                made += 1
                if made > skip:
                    yield sampled
        if made == 0:
            names = ", ".join(str(source.path) for source in self.sources)
            raise InputError(
                f"{names}: fewer than the {self.batch_size} usable examples of one batch "
                f"({self.skipped} skipped); lower `batch_size` or give more data."
            )

    def _mixed(self, rng: np.random.Generator) -> Iterator[Example]:
        """Sources interleaved; a weight of 2.5 repeats each example two or three times."""
        streams = [self._usable(source) for source in self.sources]
        alive = list(range(len(streams)))
        while alive:
            for i in list(alive):
                example = next(streams[i], None)
                if example is None:
                    alive.remove(i)
                    continue
                weight = self.sources[i].weight
                times = math.floor(weight) + (rng.random() < weight % 1.0)
                for _ in range(times):
                    yield example

    def _usable(self, source: Source) -> Iterator[Example]:
        def bad(error: InputError) -> None:
            if self.on_bad == "raise":
                raise error
            self.skipped += 1

        for example in read_examples(source, on_bad=bad):
            if len(example.negatives) < self.negatives:
                bad(
                    InputError(
                        f"{example.source}: expected at least {self.negatives} negatives, got "
                        f"{len(example.negatives)}; mine some with `vdr-db mine`, or lower "
                        "`data.negatives`."
                    )
                )
                continue
            yield example

    def _shuffled(self, examples: Iterator[Example], rng: np.random.Generator) -> Iterator[Example]:
        if self.buffer == 0:
            yield from examples
            return
        held: list[Example] = []
        for example in examples:
            if len(held) < self.buffer:
                held.append(example)
                continue
            i = int(rng.integers(len(held)))
            held[i], example = example, held[i]
            yield example
        for i in rng.permutation(len(held)):
            yield held[i]

    def _sampled(self, example: Example, rng: np.random.Generator) -> Example:
        if self.negatives == len(example.negatives):
            return example
        chosen = rng.choice(len(example.negatives), self.negatives, replace=False)
        scores = example.scores
        return replace(
            example,
            negatives=tuple(example.negatives[i] for i in chosen),
            scores=scores and (scores[0], *(scores[1 + i] for i in chosen)),
        )


def _length(example: Example) -> int:
    return len(example.positives[0])


def make_batch(own: Sequence[Example]) -> Batch:
    """A rank's examples as a batch, all with the same number of negatives."""
    scores = None
    if any(example.scores is not None for example in own):
        missing = (math.nan,) * (1 + len(own[0].negatives))
        scores = np.array([example.scores or missing for example in own], np.float32)
    documents = [example.positives[0] for example in own]
    documents += [negative for example in own for negative in example.negatives]
    return Batch([example.query for example in own], documents, len(own[0].negatives), scores)
