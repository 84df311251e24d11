"""Tokenizers out of model folders, with every setting that transformers applies.

tokenizer.json alone does not say how a folder's texts are cut: `tokenizer_class` and the keys
beside it in tokenizer_config.json rebuild parts of it. For the classes of most sparse models that
is done here, and only where the outcome is sure; all others are built by transformers itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from vdr_db.checkpoints.folders import settings_of, understood
from vdr_db.checkpoints.keys import TOKENIZER
from vdr_db.errors import ConfigError, MissingExtraError, require
from vdr_db.text.slow import SlowTokenizer
from vdr_db.text.tokenization import NAMED_TOKENS, TextTokenizer

__all__ = ["TOKENIZER_FILES", "read_tokenizer", "tokenizer_of"]

TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "spm.model"),
)
"""Any of these makes a folder hold a tokenizer."""

_BY_MODEL = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
"""Model type -> class of a folder that names none."""
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def read_tokenizer(folder: Path, *, lower_case: bool = False) -> TextTokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: Holds tokenizer.json, or the vocabulary of an older tokenizer.
        lower_case: Lower-case texts first, whatever the tokenizer does on its own.

    Raises:
        ConfigError: A file is missing, damaged, or says something that cannot be applied.
        MissingExtraError: Building it needs a package that is not installed.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{folder} must hold a tokenizer (tokenizer.json or vocab.txt), got neither; "
            "copy it there or pass `tokenizer=`."
        )
    file = folder / "tokenizer_config.json"
    settings = settings_of(file) if file.is_file() else {}
    TOKENIZER.check(file, settings)
    with understood(folder):
        settings = {**settings, **_older_special_tokens(folder, settings)}
        backend: Tokenizer | SlowTokenizer | None = None
        if (folder / "tokenizer.json").is_file():
            backend = _applied(folder, settings)
        if backend is None:
            backend, settings = _by_transformers(folder)
        return TextTokenizer(backend, settings=settings, lower_case=lower_case)


def tokenizer_of(source: Any, *, lower_case: bool = False) -> TextTokenizer:
    """The tokenizer a caller handed in, as a copy.

    Args:
        source: A `TextTokenizer`, a `tokenizers.Tokenizer`, any tokenizer of transformers, or a
            folder.
        lower_case: As in `read_tokenizer`.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(source, TextTokenizer):
        return source
    if isinstance(source, (str, Path)):
        return read_tokenizer(Path(source), lower_case=lower_case)
    backend = getattr(source, "backend_tokenizer", source)
    if isinstance(backend, Tokenizer):
        backend = Tokenizer.from_str(backend.to_str())
    elif callable(getattr(source, "get_vocab", None)) and hasattr(source, "added_tokens_decoder"):
        backend = SlowTokenizer(source)
    else:
        raise ConfigError(
            "`tokenizer` must be a folder, a tokenizers.Tokenizer or a tokenizer of "
            f"transformers, got {type(source).__name__}."
        )
    return TextTokenizer(backend, settings=_settings_of(source), lower_case=lower_case)


def _settings_of(source: Any) -> dict[str, Any]:
    """Settings of a tokenizer of transformers that matter to its texts."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, token in getattr(source, "special_tokens_map", {}).items():
        if name.endswith("_token"):
            found[name] = str(token)
    for name in ("truncation_side", "split_special_tokens", "model_max_length"):
        if hasattr(source, name):
            found[name] = getattr(source, name)
    return found


def _older_special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, which counts where added tokens stand nowhere else."""
    file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" in settings or not file.is_file():
        return {}
    found = settings_of(file)
    TOKENIZER.check(file, found)
    return found


def _by_transformers(folder: Path) -> tuple[Tokenizer | SlowTokenizer, dict[str, Any]]:
    transformers = require("transformers", "torch")
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise MissingExtraError(
            f"the tokenizer in {folder} needs a package that is not installed: "
            f"{str(error).strip().splitlines()[0]}; for Japanese run pip install "
            "'vdr-db[japanese]', for SentencePiece pip install sentencepiece."
        ) from error
    except Exception as error:  # whatever transformers raises, the folder is what is wrong
        raise ConfigError(
            f"{folder / 'tokenizer.json'} must be a tokenizer of the `tokenizers` library, or the "
            f"files beside it those of one of transformers: {error}; fetch the files again."
        ) from error
    backend = getattr(found, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return backend, _settings_of(found)
    return SlowTokenizer(found), {**_settings_of(found), "tokenizer_class": type(found).__name__}


def _applied(folder: Path, settings: Mapping[str, Any]) -> Tokenizer | None:
    """tokenizer.json with the settings applied, or None where transformers has to do it."""
    file = folder / "tokenizer.json"
    try:
        told = file.read_text("utf-8")
        raw, backend = json.loads(told), Tokenizer.from_str(told)
    except Exception as error:  # the library raises plain `Exception`
        raise ConfigError(
            f"{file} must be a tokenizer of the `tokenizers` library: {error}; "
            "fetch the file again."
        ) from error
    name = _class_of(folder, settings)
    named = {key: _content(settings.get(key)) for key in NAMED_TOKENS}
    if name is None or not _adds_nothing(folder, raw, settings, name, named):
        return None
    if name in _GENERIC:
        return backend if raw.get("post_processor") else None
    rebuilt = {
        "BertTokenizer": _word_pieces,
        "DistilBertTokenizer": _word_pieces,
        "RobertaTokenizer": _byte_pairs,
        "XLMRobertaTokenizer": _sentence_pieces,
    }.get(name)
    try:
        return rebuilt(backend, raw["model"], settings, named) if rebuilt else None
    except TypeError:  # a setting of another type: transformers says what it makes of it
        return None


def _class_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Name of the class that transformers takes, without `Fast`; None where that is its matter."""
    file = folder / "config.json"
    config = settings_of(file) if file.is_file() else {}
    known = _BY_MODEL.get(config.get("model_type", ""))
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or known
    if (config.get("model_type") and known is None) or "auto_map" in settings:
        return None
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


_DEFAULTS = {
    "BertTokenizer": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "RobertaTokenizer": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
}
_DEFAULTS["DistilBertTokenizer"] = _DEFAULTS["BertTokenizer"]
_DEFAULTS["XLMRobertaTokenizer"] = _DEFAULTS["RobertaTokenizer"]
_DEFAULT_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def _adds_nothing(
    folder: Path,
    raw: Mapping[str, Any],
    settings: Mapping[str, Any],
    name: str,
    named: dict[str, str | None],
) -> bool:
    """Whether all tokens that transformers would add are in tokenizer.json already.

    Fills in `named` what the class takes where the settings say nothing.
    """
    if name in _DEFAULTS:
        for key, token in zip(_DEFAULT_KEYS, _DEFAULTS[name], strict=True):
            if key not in settings:
                named[key] = token
        if _DEFAULTS[name] is _DEFAULTS["RobertaTokenizer"]:
            named["bos_token"] = _content(settings.get("bos_token", "<s>"))
            named["eos_token"] = _content(settings.get("eos_token", "</s>"))
        if any(named[key] is None for key in _DEFAULT_KEYS):
            return False
    added = raw.get("added_tokens") or []
    by_id = {token["id"]: {k: v for k, v in token.items() if k != "id"} for token in added}
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        if (folder / "added_tokens.json").is_file():
            return False
    elif {int(id): dict(token) for id, token in decoder.items()} != by_id:
        return False
    vocabulary = raw["model"].get("vocab", ())
    words = vocabulary if isinstance(vocabulary, Mapping) else {token for token, _ in vocabulary}
    beyond = [token["id"] for token in added if token["content"] not in words]
    if beyond != list(range(len(vocabulary), len(vocabulary) + len(beyond))):
        return False
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if not isinstance(more, list) or settings.get("model_specific_special_tokens"):
        return False
    padding = raw.get("padding") or {}
    wanted = [*filter(None, named.values()), *map(_content, more)]
    if settings.get("pad_token") is None and padding:
        wanted.append(padding.get("pad_token"))
    return set(wanted) <= {token["content"] for token in added}


def _word_pieces(
    backend: Tokenizer,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, str | None],
) -> Tokenizer | None:
    """As `BertTokenizer` builds itself from the words of the file."""
    expected = {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    if model.get("type") != "WordPiece" or any(model.get(k) != v for k, v in expected.items()):
        return None
    if model.get("unk_token") != named["unk_token"]:
        return None
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first, last = str(named["cls_token"]), str(named["sep_token"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (first, last)],
    )
    return backend


def _byte_pairs(
    backend: Tokenizer,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, str | None],
) -> Tokenizer | None:
    """As `RobertaTokenizer` builds itself from the words and merges of the file."""
    words = model.get("vocab", {})
    odd = [model.get(key) for key in ("dropout", "byte_fallback", "ignore_merges", "fuse_unk")]
    odd += [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if model.get("type") != "BPE" or any(odd) or any(byte not in words for byte in _BYTES):
        return None
    spaced = settings.get("add_prefix_space", False)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    first, last = str(named["cls_token"]), str(named["sep_token"])
    backend.post_processor = processors.RobertaProcessing(
        (last, int(backend.token_to_id(last) or 0)),
        (first, int(backend.token_to_id(first) or 0)),
        settings.get("trim_offsets", True),
        spaced,
    )
    return backend


def _sentence_pieces(
    backend: Tokenizer,
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
    named: Mapping[str, str | None],
) -> Tokenizer | None:
    """As `XLMRobertaTokenizer` builds itself from the pieces of the file."""
    if model.get("type") != "Unigram" or model.get("unk_id") != 3 or model.get("byte_fallback"):
        return None
    if backend.normalizer is not None and type(backend.normalizer) is not normalizers.Precompiled:
        return None
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme),
        ]
    )
    first, last = str(named["bos_token"]), str(named["eos_token"])
    backend.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last],
        pair=[first, "$A", last, last, "$B", last],
        special_tokens=[(token, backend.token_to_id(token)) for token in (first, last)],
    )
    return backend
