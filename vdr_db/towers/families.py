"""BERT, DistilBERT and RoBERTa as data: their config keys and the names of their weights.

The three families share one computation (`text_body`) and differ in names, in the first position
number and in a few constants. Everything that differs stands in `FAMILIES`; no other module knows
the name of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdr_db.errors import ConfigError

__all__ = [
    "FAMILIES",
    "HEADS",
    "TOLERATED",
    "BodyConfig",
    "Family",
    "WeightNames",
    "family_of",
    "find_family",
]

WeightNames = dict[str, tuple[str, ...]]
"""Name of a weight in our modules -> its possible names in a checkpoint, the usual one first."""


@dataclass(frozen=True)
class BodyConfig:
    """Sizes and constants of a transformer body.

    Attributes:
        family: A key of `FAMILIES`.
        vocab_size: Rows of the word embeddings.
        hidden_size: Width H of the hidden states.
        layers: Number of transformer layers.
        heads: Attention heads; divides `hidden_size`.
        intermediate_size: Width of the feed-forward part.
        positions: Rows of the position embeddings.
        token_types: Rows of the token type embeddings; 0 when the family has none.
        norm_eps: Epsilon of the LayerNorms of the body.
        activation: Name of the feed-forward activation, a key of `text_body.ACTIVATIONS`.
        head_activation: Name of the activation of the family's own MLM transform.
        pad_id: Token id of padding.
        first_position: Position number of the first token.
        hidden_dropout: Dropout of embeddings and layer outputs, used in training only.
        attention_dropout: Dropout of attention weights, used in training only.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    positions: int
    token_types: int
    norm_eps: float
    activation: str
    head_activation: str
    pad_id: int
    first_position: int
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Checks that sizes are possible.

        Raises:
            ConfigError: A size is not positive, heads do not divide the hidden size, or there is
                no such token as the padding.
        """
        for name in ("vocab_size", "hidden_size", "layers", "heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`{name}` of the transformer must be at least 1, got {getattr(self, name)}; "
                    "the model's config.json is damaged."
                )
        if self.token_types < 0 or self.max_length < 1:
            raise ConfigError(
                f"config.json must name at least one position and no negative number of token "
                f"types, got {self.positions} and {self.token_types}; the file is damaged."
            )
        if not 0 <= self.pad_id < self.vocab_size:
            raise ConfigError(
                f"`pad_token_id` in config.json must be an id in [0, {self.vocab_size}), got "
                f"{self.pad_id}; the file is damaged."
            )
        if self.hidden_size % self.heads:
            raise ConfigError(
                f"the number of attention heads must divide the hidden size {self.hidden_size}, "
                f"got {self.heads}; set the right `num_attention_heads` in the model's config.json."
            )

    @property
    def max_length(self) -> int:
        """Longest text in tokens, special tokens included, that has position embeddings."""
        return self.positions - self.first_position


@dataclass(frozen=True)
class Family:
    """Names and constants of one family of models.

    Attributes:
        name: `"bert"`, `"distilbert"` or `"roberta"`.
        model_types: Values of `model_type` in config.json that belong here.
        masked_lm: Class name of the family's masked language model.
        body_prefix: Prefix of the body's weights in such a model.
        config_keys: `BodyConfig` field -> key in config.json.
        defaults: Value of a `BodyConfig` field whose key is missing in config.json.
        embeddings: Our name -> checkpoint name, below `body_prefix`.
        layer_prefix: Prefix of layer i below `body_prefix`, with `{i}`.
        layer: Our name -> checkpoint name of the parts of a layer.
        masked_lm_head: Our name -> checkpoint names of the MLM head, no prefix.
        head_bias: Checkpoint names of the decoder's bias; the first one there is what the family's
            own code adds, the others repeat it.
        decoder: Checkpoint name of the decoder matrix; absent in a file when tied.
        fixed_head_activation: Activation of the MLM transform, if not the body's.
        counts_from_pad: Whether position numbers start after the padding id.
    """

    name: str
    model_types: tuple[str, ...]
    masked_lm: str
    body_prefix: str
    config_keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    embeddings: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]
    masked_lm_head: Mapping[str, str]
    head_bias: tuple[str, ...]
    decoder: str
    fixed_head_activation: str | None = None
    counts_from_pad: bool = False

    def body_config(self, config: Mapping[str, Any]) -> BodyConfig:
        """Sizes and constants out of a Hugging Face config.json.

        Raises:
            ConfigError: A value has the wrong type, or the position embeddings are of a kind this
                library does not compute.
        """
        kind = config.get("position_embedding_type", "absolute")
        if kind not in ("absolute", None) or config.get("sinusoidal_pos_embds"):
            raise ConfigError(
                "the model's position embeddings must be absolute and learned, got "
                f"position_embedding_type={kind!r} and sinusoidal_pos_embds="
                f"{config.get('sinusoidal_pos_embds', False)}; such a model is not supported."
            )
        given = {name: config.get(key) for name, key in self.config_keys.items()}
        values: dict[str, Any] = {**self.defaults}
        values.update({name: value for name, value in given.items() if value is not None})
        for name, value in values.items():
            wanted = type(self.defaults[name])
            if wanted is float and isinstance(value, int) and not isinstance(value, bool):
                values[name] = float(value)
            elif type(value) is not wanted:
                raise ConfigError(
                    f"`{self.config_keys.get(name, name)}` in config.json must be a "
                    f"{wanted.__name__}, got {value!r}; the file is damaged."
                )
        derived: dict[str, Any] = {
            "family": self.name,
            "first_position": values["pad_id"] + 1 if self.counts_from_pad else 0,
            "head_activation": self.fixed_head_activation or values["activation"],
        }
        return BodyConfig(**values, **derived)

    def body_names(self, layers: int, *, prefix: str | None = None) -> WeightNames:
        """Weights of the body.

        Args:
            layers: Number of layers.
            prefix: Prefix in the checkpoint instead of the family's own.
        """
        prefix = self.body_prefix if prefix is None else prefix
        names: WeightNames = {ours: (prefix + theirs,) for ours, theirs in self.embeddings.items()}
        for i in range(layers):
            for ours, theirs in self.layer.items():
                names[f"layers.{i}.{ours}"] = (prefix + self.layer_prefix.format(i=i) + theirs,)
        return names

    def head_names(self, head: str) -> WeightNames:
        """Weights of the head, but for the decoder matrix, which may be tied.

        Args:
            head: `"vdr"`, `"mlm"` or `"mean"`.
        """
        if head == "mean":  # of no published model: our own names
            return {name: (name,) for name in MEAN_HEAD}
        if head == "vdr":
            return {"norm.weight": ("ln.weight",), "norm.bias": ("ln.bias",)}
        names: WeightNames = {ours: (theirs,) for ours, theirs in self.masked_lm_head.items()}
        names["bias"] = self.head_bias
        return names

    def to_hf_config(self, config: BodyConfig, *, masked_lm: bool) -> dict[str, Any]:
        """What config.json of a saved model says; `body_config` reads it back."""
        written: dict[str, Any] = {
            key: getattr(config, name) for name, key in self.config_keys.items()
        }
        written["model_type"] = self.model_types[0]
        if masked_lm:
            written["architectures"] = [self.masked_lm]
        return written


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


HEADS = ("vdr", "mlm", "mean")
"""Names of the heads of text encoders."""

MEAN_HEAD = ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "scale", "bias")

_BERT_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "pad_id": "pad_token_id",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_BERT_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "layers": 12,
    "heads": 12,
    "intermediate_size": 3072,
    "positions": 512,
    "token_types": 2,
    "norm_eps": 1e-12,
    "activation": "gelu",
    "pad_id": 0,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
_BERT_EMBEDDINGS = {
    "embeddings.word.weight": "embeddings.word_embeddings.weight",
    "embeddings.position.weight": "embeddings.position_embeddings.weight",
    "embeddings.token_type.weight": "embeddings.token_type_embeddings.weight",
    **_linear("embeddings.norm", "embeddings.LayerNorm"),
}
_BERT_LAYER = {
    **_linear("query", "attention.self.query"),
    **_linear("key", "attention.self.key"),
    **_linear("value", "attention.self.value"),
    **_linear("attended", "attention.output.dense"),
    **_linear("attended_norm", "attention.output.LayerNorm"),
    **_linear("up", "intermediate.dense"),
    **_linear("down", "output.dense"),
    **_linear("down_norm", "output.LayerNorm"),
}

FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        name="bert",
        model_types=("bert",),
        masked_lm="BertForMaskedLM",
        body_prefix="bert.",
        config_keys=_BERT_CONFIG_KEYS,
        defaults=_BERT_DEFAULTS,
        embeddings=_BERT_EMBEDDINGS,
        layer_prefix="encoder.layer.{i}.",
        layer=_BERT_LAYER,
        masked_lm_head={
            **_linear("dense", "cls.predictions.transform.dense"),
            **_linear("norm", "cls.predictions.transform.LayerNorm"),
        },
        head_bias=("cls.predictions.decoder.bias", "cls.predictions.bias"),
        decoder="cls.predictions.decoder.weight",
    ),
    "distilbert": Family(
        name="distilbert",
        model_types=("distilbert",),
        masked_lm="DistilBertForMaskedLM",
        body_prefix="distilbert.",
        config_keys={
            "vocab_size": "vocab_size",
            "hidden_size": "dim",
            "layers": "n_layers",
            "heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "positions": "max_position_embeddings",
            "activation": "activation",
            "pad_id": "pad_token_id",
            "hidden_dropout": "dropout",
            "attention_dropout": "attention_dropout",
        },
        defaults={**_BERT_DEFAULTS, "layers": 6, "token_types": 0},
        embeddings={
            "embeddings.word.weight": "embeddings.word_embeddings.weight",
            "embeddings.position.weight": "embeddings.position_embeddings.weight",
            **_linear("embeddings.norm", "embeddings.LayerNorm"),
        },
        layer_prefix="transformer.layer.{i}.",
        layer={
            **_linear("query", "attention.q_lin"),
            **_linear("key", "attention.k_lin"),
            **_linear("value", "attention.v_lin"),
            **_linear("attended", "attention.out_lin"),
            **_linear("attended_norm", "sa_layer_norm"),
            **_linear("up", "ffn.lin1"),
            **_linear("down", "ffn.lin2"),
            **_linear("down_norm", "output_layer_norm"),
        },
        masked_lm_head={
            **_linear("dense", "vocab_transform"),
            **_linear("norm", "vocab_layer_norm"),
        },
        head_bias=("vocab_projector.bias",),
        decoder="vocab_projector.weight",
    ),
    "roberta": Family(
        name="roberta",
        model_types=("roberta", "xlm-roberta", "camembert"),
        masked_lm="RobertaForMaskedLM",
        body_prefix="roberta.",
        config_keys=_BERT_CONFIG_KEYS,
        # the class default of a key that a config.json leaves out
        defaults={**_BERT_DEFAULTS, "vocab_size": 50265, "pad_id": 1},
        embeddings=_BERT_EMBEDDINGS,
        layer_prefix="encoder.layer.{i}.",
        layer=_BERT_LAYER,
        masked_lm_head={
            **_linear("dense", "lm_head.dense"),
            **_linear("norm", "lm_head.layer_norm"),
        },
        head_bias=("lm_head.decoder.bias", "lm_head.bias"),
        decoder="lm_head.decoder.weight",
        fixed_head_activation="gelu",
        counts_from_pad=True,
    ),
}

# Weights that checkpoints carry and no vector needs: poolers, position counters, the second half of
# BERT's pre-training head.
TOLERATED = re.compile(
    r"(^|\.)(embeddings\.(position_ids|token_type_ids)|pooler\.dense\.(weight|bias)"
    r"|cls\.seq_relationship\.(weight|bias))$"
)


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a Hugging Face config.json, or None where it is none of these."""
    model_type = config.get("model_type")
    families = (family for family in FAMILIES.values() if model_type in family.model_types)
    return next(families, None)


def find_family(config: Mapping[str, Any]) -> Family:
    """The same, where there must be one.

    Raises:
        ConfigError: `model_type` names a family whose bodies are not computed here.
    """
    found = family_of(config)
    if found is not None:
        return found
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ConfigError(
        f"`model_type` in config.json must be one of {known}, got {config.get('model_type')!r}; "
        "bodies of other families are not computed here."
    )
