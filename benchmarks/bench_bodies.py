"""Bodies of transformers on packed texts against sentence-transformers, on the CPU.

    python benchmarks/bench_bodies.py --out benchmarks/results/bodies.csv

Models of random weights, six layers of width 384, in one process, the two libraries by turns and
first in turn, one thread. What counts is processor time, and the median of the rounds' ratios.
Vectors of both are compared before: the largest difference is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import Row, rows_of, write_csv
from sentence_transformers import SparseEncoder as Peer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from vdr_db.encoders.text import SparseEncoder

SIZES = {
    "hidden_size": 384,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODULES = "sentence_transformers.sparse_encoder.modules."
KINDS = {
    "bert": {},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
}


def write(folder: Path, kind: str, words: int) -> Path:
    """A model of a family with a tokenizer of whole words."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(words - 4))]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    config = AutoConfig.for_model(kind, vocab_size=words, **SIZES, **KINDS[kind])
    decoder = kind == "qwen3"
    if decoder:
        config.is_causal = False
    auto = AutoModelForCausalLM if decoder else AutoModelForMaskedLM
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]"}
    settings = {f"{key}_token": token for key, token in named.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    inner = {"transformer_task": "text-generation" if decoder else "fill-mask"}
    if decoder:
        text = {"method": "forward", "method_output_name": "logits"}
        inner |= {"modality_config": {"text": text}, "module_output_name": "token_embeddings"}
        inner["processing_kwargs"] = {"text": {"logits_to_keep": 0}}
    listed = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": f"{MODULES}SpladePooling"},
    ]
    (folder / "1_SpladePooling").mkdir()
    for name, content in {
        "tokenizer_config.json": settings,
        "sentence_bert_config.json": inner,
        "modules.json": listed,
        "1_SpladePooling/config.json": {"pooling_strategy": "max", "activation_function": "relu"},
        "config_sentence_transformers.json": {"model_type": "SparseEncoder"},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def measured(kind: str, texts: list[str], words: int, rounds: int) -> list[Row]:
    """Rows of one family: both libraries, their ratio, and how far apart their vectors are."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = write(Path(scratch) / "m", kind, words)
        ours = SparseEncoder.from_pretrained(folder, device="cpu")
        theirs = Peer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
        arms = {
            "vdr-db": lambda: ours.encode_documents(texts),
            "sentence-transformers": lambda: theirs.encode_document(
                texts, show_progress_bar=False, convert_to_sparse_tensor=False
            ),
        }
        found = {name: work() for name, work in arms.items()}
        dense = ours.encode_documents(texts).to_scipy().toarray()
        gap = float(np.abs(dense - found["sentence-transformers"].numpy()).max())
        samples: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(rounds):
            for name in list(arms)[:: 1 if turn % 2 else -1]:
                samples[name].append(milliseconds(arms[name]))
    shape = f"{kind}, {len(texts)} texts"
    rows: list[Row] = []
    for name, values in samples.items():
        rows += rows_of("bodies", name, shape, "float32", {"processor (ms)": values})
    ratios = [theirs / ours for ours, theirs in zip(*samples.values(), strict=True)]
    rows += rows_of("bodies", "speedup", shape, "float32", {"ratio (1)": ratios})
    return rows + rows_of("bodies", "difference", shape, "float32", {"largest (1)": [gap]})


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=30522)
    parser.add_argument("--out", type=Path, help="CSV")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.2, 0.6, options.texts), 8, 400).astype(int)
    texts = [" ".join(f"w{i}" for i in draw.integers(0, options.words - 4, n)) for n in lengths]
    rows: list[Row] = []
    for kind in options.kinds:
        rows += measured(kind, texts, options.words, options.rounds)
    for row in rows:
        print(f"{row.shape:24} {row.backend:22} {row.median:10} {row.unit}")
    if options.out is not None:
        write_csv(options.out, rows)


if __name__ == "__main__":
    main()
