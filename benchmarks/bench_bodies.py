"""Bodies of transformers on packed texts against sentence-transformers, on the CPU.

Models of random weights, in one process, the two libraries by turns; ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
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


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--words", type=int, default=30522)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.2, 0.6, arguments.texts), 8, 400).astype(int)
    texts = [" ".join(f"w{i}" for i in draw.integers(0, arguments.words - 4, n)) for n in lengths]
    print(
        f"{arguments.texts} texts of {lengths.mean():.0f} tokens, {torch.get_num_threads()} threads"
    )
    print("| body | vdr-db s | sentence-transformers s | ratio |\n|---|---|---|---|")
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = write(Path(scratch) / "m", kind, arguments.words)
            ours = SparseEncoder.from_pretrained(folder, device="cpu")
            theirs = Peer(str(folder), device="cpu")
            works = (
                lambda: ours.encode_documents(texts),  # noqa: B023
                lambda: theirs.encode_document(texts, show_progress_bar=False),  # noqa: B023
            )
            for work in works:
                work()
            times = [[seconds(work) for work in works] for _ in range(arguments.repeats)]
        mine, peer = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        print(f"| {kind} | {mine:.2f} | {peer:.2f} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
