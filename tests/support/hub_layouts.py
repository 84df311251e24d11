"""Folders as the hub has them, one writer a kind of published model, with small random weights.

Models are made and saved by transformers itself, so that names and shapes are those of the library
that published models are read with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from model_folders import (
    bert_tokenizer,
    change_json,
    write_bert,
    write_distilbert,
    write_roberta,
)
from safetensors.torch import load_file, save_file

MODULES = "sentence_transformers.sparse_encoder.models."
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 90,
    "pad_token_id": 0,
}
MARKS = {"bos_token_id": 101, "eos_token_id": 102}
MODERNBERT = {
    **SIZES,
    **MARKS,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "global_attn_every_n_layers": 3,
    "cls_token_id": 101,
    "sep_token_id": 102,
}
ALBERT = {**SIZES, "embedding_size": 16}
ROBERTA_MARKS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DECODER = {**SIZES, **MARKS, "num_key_value_heads": 2}
BERT_NAMES = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def shaken(model, seed: int = 0):
    """The model with weights that let every part show in the result."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.2 if parameter.dim() > 1 else parameter.data + noise * 0.1
    return model.eval()


def add_bert_words(folder: Path) -> Path:
    bert_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(BERT_NAMES))
    return folder


def write_model(folder: Path, kind: str, *, decoder: bool = False, **config) -> Path:
    """A masked language model, or a decoder, of any family of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    auto = AutoModelForCausalLM if decoder else AutoModelForMaskedLM
    is_bidirectional = config.pop("is_causal", True) is False
    made = AutoConfig.for_model(kind, vocab_size=bert_tokenizer().get_vocab_size(), **config)
    if is_bidirectional:
        made.is_causal = False
    shaken(auto.from_config(made)).save_pretrained(folder)
    return add_bert_words(folder)


def write_modules(
    folder: Path,
    *names: str,
    activation: str = "relu",
    prefix: str = MODULES,
    settings: dict | None = None,
) -> Path:
    """modules.json around a model that lies in the folder."""
    listed = []
    for i, name in enumerate(names):
        path = "" if i == 0 else f"{i}_{name}"
        (folder / path).mkdir(exist_ok=True)
        listed.append({"idx": i, "name": str(i), "path": path, "type": prefix + name})
        if name == "SpladePooling":
            pooling = {"pooling_strategy": "max", "activation_function": activation}
            (folder / path / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(listed))
    outer = {"model_type": "SparseEncoder", **(settings or {})}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(outer))
    return folder


def write_static(
    folder: Path, *, idf: bool = True, words: Path | None = None, seed: int = 5
) -> Path:
    """A `SparseStaticEmbedding` with the tokenizer of another folder."""
    folder.mkdir(parents=True)
    source = words or add_bert_words(folder)
    if words is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder)
    size = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(len(size), generator=generator) * 9 if idf else torch.ones(len(size))
    weight[::7] = 0.0
    save_file({"weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"frozen": true}')
    return folder


def write_router(folder: Path, query: list, document: list, *, path: str = "", **outer) -> Path:
    """A router: each side is a list of (class name, function that writes its folder)."""
    place = folder / path
    place.mkdir(parents=True, exist_ok=True)
    types, structure = {}, {}
    for side, parts in (("query", query), ("document", document)):
        structure[side] = []
        for i, (name, write) in enumerate(parts):
            id = f"{side}_{i}_{name}"
            write(place / id)
            types[id] = MODULES + name
            structure[side].append(id)
    router = {
        "types": types,
        "structure": structure,
        "parameters": {"default_route": "document", "allow_empty_key": True},
    }
    (place / "router_config.json").write_text(json.dumps(router))
    listed = [{"idx": 0, "name": "0", "path": path, "type": "sentence_transformers.models.Router"}]
    (folder / "modules.json").write_text(json.dumps(listed))
    settings = {"model_type": "SparseEncoder", "prompts": {"query": "", "document": ""}, **outer}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


def pooling(activation: str = "relu"):
    """Writes a `SpladePooling`."""

    def write(folder: Path) -> None:
        folder.mkdir()
        said = {"pooling_strategy": "max", "activation_function": activation}
        (folder / "config.json").write_text(json.dumps(said))

    return write


def masked_lm(write, **inner):
    """Writes an `MLMTransformer` with a model of `write`."""

    def written(folder: Path) -> None:
        write(folder)
        said = {"max_seq_length": 80, "do_lower_case": False, **inner}
        (folder / "sentence_bert_config.json").write_text(json.dumps(said))

    return written


def inference_free(folder: Path, write, *, activation: str = "relu", **outer) -> Path:
    """opensearch doc models and splade-v3-doc: static queries, a model for documents."""
    document = [("MLMTransformer", masked_lm(write)), ("SpladePooling", pooling(activation))]
    model = folder.with_name(folder.name + "-words")
    write(model)
    static = [("SparseStaticEmbedding", lambda place: write_static(place, words=model))]
    return write_router(folder, static, document, **outer)


def write_gte_as_published(folder: Path) -> Path:
    """A GTE model under the names of its remote code: type `new`, prefix `new.`."""
    write_model(
        folder,
        "gte",
        **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        type_vocab_size=1,
    )
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": "new",
        "architectures": ["NewForMaskedLM"],
        "auto_map": {
            "AutoConfig": "configuration.NewConfig",
            "AutoModelForMaskedLM": "m.NewForMaskedLM",
        },
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "layer_norm_type": "layer_norm",
        "logn_attention_scale": False,
        "logn_attention_clip1": False,
        "pack_qkv": True,
        "position_embedding_type": "rope",
        "unpad_inputs": False,
        "use_memory_efficient_attention": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_bge(folder: Path) -> Path:
    """bge-m3: an XLM-R body, dense modules, and a head of one column beside them."""
    write_roberta(folder, model_type="xlm-roberta", architectures=["XLMRobertaModel"])
    tensors = load_file(folder / "model.safetensors")
    body = {n.removeprefix("roberta."): t for n, t in tensors.items() if n.startswith("roberta.")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    generator = torch.Generator().manual_seed(3)
    head = {"weight": torch.randn(1, 32, generator=generator), "bias": torch.full((1,), 0.3)}
    torch.save(head, folder / "sparse_linear.pt")
    torch.save({"weight": torch.randn(8, 32)}, folder / "colbert_linear.pt")
    write_modules(
        folder, "Transformer", "Pooling", "Normalize", prefix="sentence_transformers.models."
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 85}')
    change_json(folder / "config_sentence_transformers.json", model_type="SentenceTransformer")
    return folder


def write_unicoil(folder: Path) -> Path:
    """uniCOIL: a BERT and `tok_proj`."""
    write_bert(folder, architectures=["UniCoilEncoder"])
    tensors = load_file(folder / "model.safetensors")
    body = {n: t for n, t in tensors.items() if n.startswith("bert.")}
    generator = torch.Generator().manual_seed(3)
    body["tok_proj.weight"] = torch.randn(1, 32, generator=generator)
    body["tok_proj.bias"] = torch.full((1,), 0.3)
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decode_all(folder: Path, **processing) -> Path:
    """sentence_bert_config.json of a decoder whose every token counts."""
    said = {
        "transformer_task": "text-generation",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"text": {"logits_to_keep": 0, **processing}},
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(said))
    return folder


def write_splade_code(folder: Path) -> Path:
    """A Qwen3 that reads in both directions."""
    write_model(folder, "qwen3", decoder=True, is_causal=False, head_dim=8, **DECODER)
    return decode_all(
        write_modules(
            folder,
            "Transformer",
            "SpladePooling",
            prefix="sentence_transformers.sparse_encoder.modules.",
        )
    )


def write_lora(folder: Path) -> Path:
    """A LoRA adapter to a Mistral, with the modules of a sparse encoder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_model(
        folder.with_name(folder.name + "-base"),
        "mistral",
        decoder=True,
        is_causal=False,
        sliding_window=6,
        **DECODER,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    adapted.save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    add_bert_words(folder)
    return decode_all(
        write_modules(
            folder,
            "Transformer",
            "SpladePooling",
            prefix="sentence_transformers.sparse_encoder.modules.",
        )
    )


def splade(write, **options):
    """A folder of sentence-transformers around a model of `write`."""

    def written(folder: Path) -> Path:
        write(folder)
        return write_modules(folder, "MLMTransformer", "SpladePooling", **options)

    return written


def of_family(kind: str, **config):
    return lambda folder: write_model(folder, kind, **config)


def write_xlm_roberta(folder: Path) -> Path:
    return write_roberta(folder, model_type="xlm-roberta", architectures=["XLMRobertaForMaskedLM"])


def write_half(write):
    """The same with weights in bfloat16."""

    def written(folder: Path) -> Path:
        write(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        change_json(folder / "config.json", dtype="bfloat16")
        return folder

    return written


def efficient_splade(folder: Path) -> Path:
    """Two masked language models, a smaller one for queries."""

    def small(place: Path) -> Path:
        return write_bert(place, seed=8, num_hidden_layers=1)

    return write_router(
        folder,
        [("MLMTransformer", masked_lm(small)), ("SpladePooling", pooling())],
        [("MLMTransformer", masked_lm(write_distilbert)), ("SpladePooling", pooling())],
    )


def splade_lexical(folder: Path) -> Path:
    """Queries keep their own tokens only."""
    return write_router(
        folder,
        [
            ("MLMTransformer", masked_lm(write_bert)),
            ("SpladePooling", pooling()),
            ("SparseStaticEmbedding", lambda place: write_static(place, idf=False)),
        ],
        [
            ("MLMTransformer", masked_lm(lambda place: write_bert(place, seed=2))),
            ("SpladePooling", pooling()),
        ],
    )


ROWS = {
    "1 splade v2, cocondenser": splade(write_bert),
    "2 splade-v3-distilbert": splade(write_distilbert),
    "3 Splade_PP": splade(write_bert, settings={"max_active_dims": 12}),
    "4 opensearch v2-distill": splade(write_distilbert, settings={"prompts": {"query": "the "}}),
    "5 granite": splade(write_half(write_roberta), settings={"prompts": {"query": "a "}}),
    "6 XLM-R": splade(write_xlm_roberta),
    "8 opensearch doc-v2": lambda folder: inference_free(folder, write_distilbert),
    "8 opensearch doc-v3-distill": lambda folder: inference_free(
        folder, write_distilbert, activation="log1p_relu", max_active_dims=9
    ),
    "9 opensearch doc multilingual": lambda folder: inference_free(folder, write_roberta),
    "10 efficient-splade": efficient_splade,
    "11 splade-v3-doc": lambda folder: inference_free(folder, write_bert, path=""),
    "12 splade-v3-lexical": splade_lexical,
    "15 ModernBERT": splade(of_family("modernbert", **MODERNBERT)),
    "15 EuroBERT": splade(of_family("eurobert", num_key_value_heads=2, **SIZES, **MARKS)),
    "15 NomicBERT": splade(of_family("nomic_bert", **SIZES)),
    "16 splade-code": write_splade_code,
    "17 Mistral-SPLADE": write_lora,
    "18 MPNet": splade(of_family("mpnet", **{**SIZES, **ROBERTA_MARKS})),
    "18 DeBERTa": splade(
        of_family(
            "deberta-v2",
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            **SIZES,
        )
    ),
    "19 ELECTRA": splade(of_family("electra", **ALBERT)),
    "19 ALBERT": splade(of_family("albert", **ALBERT)),
}
"""Rows of models.md that sentence-transformers reads -> how such a folder is written."""
