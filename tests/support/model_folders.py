"""Model folders written as their authors write them: names and shapes from the files' own formats.

Nothing here knows the library under test. Weights are small and random, but of a size that lets
every part of a forward pass show in the result.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# fmt: off
WORDS = [
    "the", "of", "and", "a", "in", "to", "cat", "cats", "dog", "blue", "green", "book", "books",
    "sea", "wave", "paint", "paper", "theory", "light", "heavy", "small", "large", "run",
    "running", "##ning", "##s", "##ed", "##ly", "water", "sun", "moon", "star",
]
# fmt: on
ACCENTS = ["é", "ß", "Ω", "语", "##й"]

BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
ROBERTA = {
    **BERT,
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "type_vocab_size": 1,
    "max_position_embeddings": 90,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
DISTILBERT = {
    "model_type": "distilbert",
    "architectures": ["DistilBertForMaskedLM"],
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
    "activation": "gelu",
    "pad_token_id": 0,
    "sinusoidal_pos_embds": False,
}


def bert_tokens() -> list[str]:
    """A word-piece vocabulary with BERT's special ids and its first character at id 999."""
    tokens = [f"[unused{i}]" for i in range(999)]
    tokens[0], tokens[100], tokens[101], tokens[102], tokens[103] = (
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        "[MASK]",
    )
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return list(dict.fromkeys([*tokens, *characters, *ACCENTS, *pieces, *WORDS]))


def bert_tokenizer() -> Tokenizer:
    tokens = bert_tokens()
    tokenizer = Tokenizer(
        models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.enable_truncation(12)  # published files carry such settings; they must not matter
    tokenizer.enable_padding(length=16)
    return tokenizer


def roberta_tokenizer() -> Tokenizer:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "b"), ("Ġb", "l"), ("u", "e"), ("Ġbl", "ue")]
    tokens = [*special, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(special)
    return tokenizer


class Weights:
    """Random tensors by name, the same on every run."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, *shape: int, spread: float = 0.2, center: float = 0.0) -> None:
        values = self.generator.normal(center, spread, shape).astype(np.float32)
        self.tensors[name] = torch.from_numpy(values)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.add(f"{name}.weight", rows, columns)
        self.add(f"{name}.bias", rows)

    def norm(self, name: str, width: int, parts: tuple[str, str] = ("weight", "bias")) -> None:
        self.add(f"{name}.{parts[0]}", width, center=1.0)
        self.add(f"{name}.{parts[1]}", width)


def bert_body(
    weights: Weights, prefix: str, config: dict, vocab: int, norms: tuple[str, str]
) -> None:
    """BERT and RoBERTa: the names of `BertModel`, without its pooler."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    weights.add(f"{prefix}embeddings.word_embeddings.weight", vocab, width, spread=0.5)
    positions = config["max_position_embeddings"]
    weights.add(f"{prefix}embeddings.position_embeddings.weight", positions, width)
    types = config["type_vocab_size"]
    weights.add(f"{prefix}embeddings.token_type_embeddings.weight", types, width)
    weights.norm(f"{prefix}embeddings.LayerNorm", width, norms)
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}encoder.layer.{i}."
        for part in ("query", "key", "value"):
            weights.linear(f"{layer}attention.self.{part}", width, width)
        weights.linear(f"{layer}attention.output.dense", width, width)
        weights.norm(f"{layer}attention.output.LayerNorm", width, norms)
        weights.linear(f"{layer}intermediate.dense", wide, width)
        weights.linear(f"{layer}output.dense", width, wide)
        weights.norm(f"{layer}output.LayerNorm", width, norms)


def write(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor], tokenizer: Tokenizer | None
):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        is_bert = tokenizer.token_to_id("[CLS]") is not None
        names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        names = names if is_bert else ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
        keys = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict(zip(keys, names, strict=True)),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_bert(
    folder: Path,
    *,
    tied: bool = True,
    old_norm_names: bool = False,
    seed: int = 0,
    extra: dict[str, torch.Tensor] | None = None,
    **changes: object,
) -> Path:
    """`BertForMaskedLM`, as `save_pretrained` writes it."""
    tokenizer = bert_tokenizer()
    vocab = tokenizer.get_vocab_size()
    config = {**BERT, "vocab_size": vocab, "tie_word_embeddings": tied, **changes}
    width = config["hidden_size"]
    norms = ("gamma", "beta") if old_norm_names else ("weight", "bias")
    weights = Weights(seed)
    bert_body(weights, "bert.", config, vocab, norms)
    weights.linear("cls.predictions.transform.dense", width, width)
    weights.norm("cls.predictions.transform.LayerNorm", width, norms)
    weights.add("cls.predictions.bias", vocab)
    if not tied:
        weights.add("cls.predictions.decoder.weight", vocab, width)
        weights.add("cls.predictions.decoder.bias", vocab)  # the one that is added
    return write(folder, config, {**weights.tensors, **(extra or {})}, tokenizer)


def write_roberta(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """`RobertaForMaskedLM`."""
    tokenizer = roberta_tokenizer()
    vocab = tokenizer.get_vocab_size()
    config = {**ROBERTA, "vocab_size": vocab, "tie_word_embeddings": True, **changes}
    width = config["hidden_size"]
    weights = Weights(seed)
    bert_body(weights, "roberta.", config, vocab, ("weight", "bias"))
    weights.linear("lm_head.dense", width, width)
    weights.norm("lm_head.layer_norm", width)
    weights.add("lm_head.bias", vocab)
    return write(folder, config, weights.tensors, tokenizer)


def write_distilbert(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """`DistilBertForMaskedLM`."""
    tokenizer = bert_tokenizer()
    vocab = tokenizer.get_vocab_size()
    config = {**DISTILBERT, "vocab_size": vocab, "tie_word_embeddings": True, **changes}
    width, wide = config["dim"], config["hidden_dim"]
    weights = Weights(seed)
    prefix = "distilbert."
    weights.add(f"{prefix}embeddings.word_embeddings.weight", vocab, width, spread=0.5)
    positions = config["max_position_embeddings"]
    weights.add(f"{prefix}embeddings.position_embeddings.weight", positions, width)
    weights.norm(f"{prefix}embeddings.LayerNorm", width)
    for i in range(config["n_layers"]):
        layer = f"{prefix}transformer.layer.{i}."
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            weights.linear(f"{layer}attention.{part}", width, width)
        weights.norm(f"{layer}sa_layer_norm", width)
        weights.linear(f"{layer}ffn.lin1", wide, width)
        weights.linear(f"{layer}ffn.lin2", width, wide)
        weights.norm(f"{layer}output_layer_norm", width)
    weights.linear("vocab_transform", width, width)
    weights.norm("vocab_layer_norm", width)
    weights.add("vocab_projector.bias", vocab)
    return write(folder, config, weights.tensors, tokenizer)


def write_sentence_transformers(
    folder: Path,
    *,
    pooling: dict | None = None,
    transformer: dict | None = None,
    settings: dict | None = None,
    types: tuple[str, ...] = (
        "sentence_transformers.base.modules.transformer.Transformer",
        "sentence_transformers.sparse_encoder.modules.splade_pooling.SpladePooling",
    ),
    **changes: object,
) -> Path:
    """A sparse encoder with a masked language model and SPLADE pooling."""
    write_bert(folder, **changes)
    (folder / "1_SpladePooling").mkdir()
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": types[0]},
        {"idx": 1, "name": "1", "path": "1_SpladePooling", "type": types[1]},
        *(
            {"idx": 2 + i, "name": str(2 + i), "path": "", "type": t}
            for i, t in enumerate(types[2:])
        ),
    ]
    inner = {"transformer_task": "fill-mask", **(transformer or {})}
    content = {
        "modules.json": modules,
        "sentence_bert_config.json": inner,
        "config_sentence_transformers.json": {"model_type": "SparseEncoder", **(settings or {})},
        "1_SpladePooling/config.json": {
            "pooling_strategy": "max",
            "activation_function": "relu",
            **(pooling or {}),
        },
    }
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value))
    return folder


UPSTREAM_SCHEMAS = ("2024", "spring 2024", "2023")


def upstream_config(schema: str, *, shared: bool, kind: str, **changes: object) -> dict:
    """config.json of the three generations of published checkpoints."""
    lengths = {"encoder_q": 10, "encoder_p": 20}
    if schema == "2023":
        config = {"alias": kind, "architectures": ["VDRRetriever"], "device": None, "dropout": 0.1}
        config |= {"semiparametric": True, "sequence_length": 512, "shared_encoder": shared}
        for side, length in lengths.items():
            config[side] = {
                "base_model_id": "bert-base-uncased",
                "max_seq_len": length,
                "norm": False,
                "prefix": f"{side}.",
                "pretrained": True,
                "shift_vocab_num": 1000,
                **changes,
            }
        return config
    names = {"vdr_crossmodal_text": "vdr_cm_text"} if schema == "spring 2024" else {}
    config = {"architectures": ["Retriever"], "device": None, "shared_encoder": shared}
    if schema == "spring 2024":
        config["type"] = kind
    for side, length in lengths.items():
        config[side] = {
            "max_len": length,
            "model_id": "bert-base-uncased",
            "norm": False,
            "pooling": "max",
            "pooling_topk": None,
            "shift_vocab_num": 999,
            "topk": 30,
            "type": names.get(kind, kind),
            **changes,
        }
    return config


def write_upstream(
    folder: Path,
    *,
    schema: str = "2024",
    shared: bool = False,
    kind: str = "vdr",
    file: str = "safetensors",
    prefixes: tuple[str, ...] = ("encoder_q", "encoder_p"),
    tolerated: bool = True,
    tokenizer: bool = True,
    seed: int = 0,
    **changes: object,
) -> Path:
    """A `Retriever` of the published VDR code."""
    vocab = len(bert_tokens())
    sizes = {"num_attention_heads": 4, "hidden_size": 32}
    config = upstream_config(schema, shared=shared, kind=kind, **{**sizes, **changes})
    weights = Weights(seed)
    for prefix in prefixes:
        bert_body(weights, f"{prefix}.bert_model.", BERT, vocab, ("weight", "bias"))
        weights.norm(f"{prefix}.ln", BERT["hidden_size"])
        if tolerated:
            name = f"{prefix}.bert_model."
            weights.tensors[f"{name}embeddings.position_ids"] = torch.arange(40)[None]
            weights.linear(f"{name}pooler.dense", BERT["hidden_size"], BERT["hidden_size"])
    if shared and len(prefixes) == 2:
        for name in list(weights.tensors):
            if name.startswith("encoder_p."):
                twin = name.replace("encoder_p.", "encoder_q.", 1)
                weights.tensors[name] = weights.tensors[twin]
    if file == "safetensors":
        return write(folder, config, weights.tensors, bert_tokenizer() if tokenizer else None)
    write(folder, config, {}, bert_tokenizer() if tokenizer else None)
    (folder / "model.safetensors").unlink()
    torch.save(weights.tensors, folder / "pytorch_model.bin")
    return folder


def change_json(file, **changes):
    """Sets keys of a JSON file."""
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, **changes}))
