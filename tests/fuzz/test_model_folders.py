"""Config files of every layout, mutated: the vectors of the library a model is from, or an error.

Never other vectors, and never a traceback of another library. `VDR_DB_FUZZ` is how many mutants
of each layout are tried; a few by default, 2,000 for a real run. A mutant that neither side can
load is fine, and so is one that only the other library loads, as long as ours says why.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import hub_layouts as hub
import numpy as np
import pytest
import torch
from hub_texts import dense

from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import VdrError

MUTANTS = int(os.environ.get("VDR_DB_FUZZ", "12"))
TEXTS = ["the Cat paints a blue book", "dog", "theory of light, running! Café"]
LAYOUTS = {
    "hugging face": hub.write_bert,
    "sentence-transformers": hub.ROWS["3 Splade_PP"],
    "byte-level": hub.ROWS["5 granite"],
    "router": hub.ROWS["8 opensearch doc-v3-distill"],
    "modernbert": hub.ROWS["15 ModernBERT"],
    "decoder": hub.write_splade_code,
}
# sizes that only say how much memory a model takes, and names of files and classes
KEPT = {"vocab_size", "model_type", "tokenizer_class"}
VALUES = [
    *(None, True, False, 0, 1, 2, -1, 3, 7, 0.5, 1e-3, "", "left", "right", "relu", "gelu", "max"),
    *("sum", "query", "document", "the ", "[SEP]", "[MASK]", "blue", [], {}, ["query"], 40, 12),
    *("log1p_relu", "silu", "absolute", "fill-mask", "../x", {"text": {}}, 1 << 40, "\u0000"),
]
NEW_KEYS = [
    *("do_lower_case", "strip_accents", "add_prefix_space", "tokenize_chinese_chars", "is_decoder"),
    *("truncation_side", "model_max_length", "max_seq_length", "query_length", "document_length"),
    *("processing_kwargs", "prompts", "default_prompt_name", "max_active_dims", "novelty"),
    *("position_embedding_type", "split_special_tokens", "cls_token", "sep_token", "unk_token"),
    *(
        "hidden_act",
        "layer_norm_eps",
        "rope_theta",
        "sliding_window",
        "is_causal",
        "transformer_task",
    ),
    *("pooling_strategy", "activation_function", "chunk_size", "default_route", "query_expansion"),
    *("added_tokens_decoder", "extra_special_tokens", "tie_word_embeddings", "quantization_config"),
]


def mutated(content, draw: random.Random):
    """A JSON value with one thing changed: a value, a key gone, a key more."""
    content = copy.deepcopy(content)
    places = [content]
    for place in places:
        children = place.values() if isinstance(place, dict) else place
        places += [child for child in children if isinstance(child, (dict, list))]
    place = draw.choice([p for p in places if p] or [content])
    if isinstance(place, dict) and (draw.random() < 0.35 or not place):
        place[draw.choice(NEW_KEYS)] = draw.choice(VALUES)
        return content
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    keys = [key for key in keys if key not in KEPT] or keys
    key = draw.choice(keys)
    if draw.random() < 0.25:
        del place[key]
    elif isinstance(place[key], str) and draw.random() < 0.3:
        place[key] = place[key] + draw.choice(["x", "/..", " "])
    else:
        place[key] = draw.choice(VALUES)
    return content


def by_them(folder: Path, layout: str) -> dict[str, np.ndarray] | None:
    """Vectors by sentence-transformers, or None where it cannot load the folder or encode."""
    from sentence_transformers import SparseEncoder as Peer

    try:
        peer = Peer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        found = {}
        for side, encode in (("query", peer.encode_query), ("document", peer.encode_document)):
            rows = [encode([text], convert_to_sparse_tensor=False).numpy() for text in TEXTS]
            found[side] = np.vstack(rows)
    except Exception:  # whatever it is, there is nothing to compare with
        return None
    return found


def by_us(folder: Path) -> dict[str, np.ndarray] | None:
    """Ours, or None with an error of ours; any other error fails the test."""
    try:
        encoder = SparseEncoder.from_pretrained(folder, device="cpu")
        return {
            "query": dense(encoder.encode_queries(TEXTS)),
            "document": dense(encoder.encode_documents(TEXTS)),
        }
    except VdrError:
        return None


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mutated_folders_give_the_same_vectors_or_an_error_of_ours(tmp_path, layout):
    whole = LAYOUTS[layout](tmp_path / "whole")
    files = [file for file in whole.rglob("*.json") if file.name != "tokenizer.json"]
    contents = {file: json.loads(file.read_text()) for file in files}
    draw = random.Random(f"{layout} {os.environ.get('VDR_DB_FUZZ_SEED', '0')}")
    loaded = 0
    for number in range(MUTANTS):
        folder = tmp_path / f"mutant-{number}"
        shutil.copytree(whole, folder, copy_function=os.link)
        file = draw.choice(files)
        place = folder / file.relative_to(whole)
        place.unlink()
        place.write_text(json.dumps(mutated(contents[file], draw)))
        said = f"{place.relative_to(folder)}: {place.read_text()}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ours = by_us(folder)
            except Exception as error:
                raise AssertionError(f"{type(error).__name__} for {said}") from error
            theirs = None if ours is None else by_them(folder, layout)
        if ours is not None and theirs is not None:
            loaded += 1
            for side, expected in theirs.items():
                assert expected.shape == ours[side].shape, f"{side} of {said}"
                gap = np.abs(expected - ours[side]).max()
                assert gap <= 2e-5, f"{side} differs by {gap} for {said}"
        shutil.rmtree(folder)
    assert loaded or MUTANTS < 10, "mutants that load are what this is about"
