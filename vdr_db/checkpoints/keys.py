"""Keys of a model folder's JSON files: which are read, which change no vector, which are refused.

One table for each kind of file. A key in none of its lists is refused: nobody can tell whether the
model that wrote it computes other vectors for it, and wrong vectors are worse than none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vdr_db.errors import ConfigError

__all__ = [
    "ADAPTER",
    "BODY",
    "HARMLESS_IN_CONFIGS",
    "MODULE",
    "POOLING",
    "PROCESSING",
    "ROUTER",
    "SENTENCE_TRANSFORMERS",
    "STATIC",
    "TOKENIZER",
    "TRANSFORMER",
    "Keys",
]


@dataclass(frozen=True)
class Keys:
    """What is known of the keys of one kind of file.

    Attributes:
        taken: Keys this library reads.
        harmless: Keys that change no vector, whatever they say.
        neutral: Key -> the values with which it changes no vector.
    """

    taken: frozenset[str]
    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def check(self, file: Path, settings: Mapping[str, Any], also: Iterable[str] = ()) -> None:
        """Refuses what may change vectors in a way nothing here computes.

        Args:
            file: For the message.
            settings: Its content.
            also: More keys that are taken.

        Raises:
            ConfigError: A key is unknown, or has a value that this library does not apply.
        """
        known = self.taken.union(self.harmless, also)
        for key, value in settings.items():
            if key in known:
                continue
            allowed = self.neutral.get(key)
            if allowed is None:
                raise ConfigError(
                    f"{file} must hold known keys only, got {key!r}; whether it changes vectors "
                    "cannot be told, so delete it in a copy of the folder if it does not."
                )
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise ConfigError(
                    f"`{key}` in {file} must be {' or '.join(map(repr, allowed))}, got {value!r}, "
                    "which would change vectors and is not supported."
                )

    def read_from(self, settings: Mapping[str, Any]) -> list[str]:
        """Keys of a file that were taken, sorted."""
        return sorted(self.taken & settings.keys())


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What configs of transformers carry along: names, training, generation, heads of other tasks.
HARMLESS_IN_CONFIGS = _words("""
    _name_or_path architectures transformers_version torch_dtype dtype initializer_range
    initializer_cutoff_factor use_cache gradient_checkpointing classifier_dropout
    classifier_activation classifier_bias classifier_pooling classifier_dropout_prob
    seq_classif_dropout qa_dropout summary_type summary_use_proj summary_activation
    summary_last_dropout summary_first_dropout summary_proj_to_labels id2label label2id num_labels
    _num_labels problem_type finetuning_task task_specific_params directionality pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type output_past
    output_hidden_states output_attentions return_dict torchscript bos_token_id eos_token_id
    cls_token_id sep_token_id mask_token_id unk_token_id decoder_start_token_id tie_weights_
    hidden_dropout hidden_dropout_prob attention_dropout attention_probs_dropout_prob dropout
    embedding_dropout mlp_dropout layerdrop xla_device tokenizer_class auto_map language name
    model_name license tf_legacy_loss use_bfloat16 prefix max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens pretraining_tp _attn_implementation attn_implementation
    _attn_implementation_autoset deterministic_flash_attn reference_compile sparse_prediction
    sparse_pred_ignore_index repad_logits_with_grad use_memory_efficient_attention unpad_inputs
    use_flash_attn pad_vocab_size_multiple sentence_transformers vocab_file
    """)

BODY = Keys(
    taken=_words("""
        model_type vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
        max_position_embeddings type_vocab_size layer_norm_eps hidden_act pad_token_id dim n_layers
        n_heads hidden_dim activation tie_word_embeddings
        """),
    harmless=HARMLESS_IN_CONFIGS | {"chunk_size_feed_forward", "cross_attention_hidden_size"},
    neutral={
        "position_embedding_type": ("absolute", None),
        "sinusoidal_pos_embds": (False, None),
        "is_decoder": (False, None),
        "is_encoder_decoder": (False, None),
        "add_cross_attention": (False, None),
        "tie_encoder_decoder": (False, None),
        "pruned_heads": ({}, None),
        "quantization_config": (None,),
        "adapters": (None, {}),
        "embedding_size": (None,),
    },
)
"""config.json of BERT, DistilBERT and RoBERTa, whose bodies are computed here."""

_ARGUMENTS: tuple[Any, ...] = ({}, None)
TRANSFORMER = Keys(
    taken=_words("""
        max_seq_length do_lower_case transformer_task query_length document_length
        processing_kwargs
        """),
    harmless=frozenset(["unpad_inputs", "backend"]),
    neutral={
        "modality_config": ({"text": {"method": "forward", "method_output_name": "logits"}}, None),
        "module_output_name": ("token_embeddings", None),
        "query_expansion": (None,),
        "tokenizer_name_or_path": (None,),
        **dict.fromkeys(
            [f"{part}_{kind}" for part in ("model", "config") for kind in ("args", "kwargs")],
            _ARGUMENTS,
        ),
        **dict.fromkeys(["tokenizer_args", "processor_kwargs"], _ARGUMENTS),
    },
)
"""sentence_bert_config.json and its like."""

PROCESSING = Keys(
    taken=frozenset(["max_length", "logits_to_keep"]),
    harmless=frozenset(["padding", "pad_to_multiple_of", "return_tensors", "verbose"]),
    neutral={
        "truncation": (True, "longest_first", "only_first"),
        "add_special_tokens": (True,),
        "return_attention_mask": (True, None),
        "return_token_type_ids": (True, None),
        "padding_side": ("right",),
    },
)
"""A part of `processing_kwargs` for texts."""

POOLING = Keys(
    taken=frozenset(["pooling_strategy", "activation_function"]),
    harmless=frozenset(["embedding_dimension", "word_embedding_dimension", "chunk_size"]),
)
"""config.json of SpladePooling."""

STATIC = Keys(taken=frozenset(["path"]), harmless=frozenset(["frozen"]))
"""config.json of SparseStaticEmbedding and of IDF, its older name."""

ROUTER = Keys(
    taken=frozenset(["default_route", "allow_empty_key", "route_mappings"]),
)
"""`parameters` in router_config.json."""

MODULE = Keys(
    taken=frozenset(["path", "type"]),
    harmless=frozenset(["idx", "name"]),
    neutral={"kwargs": ([], None, ["task"], ["modality"], ["task", "modality"])},
)
"""An entry of modules.json."""

SENTENCE_TRANSFORMERS = Keys(
    taken=frozenset(["prompts", "default_prompt_name", "max_active_dims", "model_type"]),
    harmless=frozenset(["__version__", "similarity_fn_name", "requirements"]),
    neutral={"truncate_dim": (None,)},
)
"""config_sentence_transformers.json."""

TOKENIZER = Keys(
    taken=_words("""
        tokenizer_class do_lower_case strip_accents tokenize_chinese_chars add_prefix_space
        trim_offsets bos_token eos_token unk_token sep_token pad_token cls_token mask_token
        additional_special_tokens extra_special_tokens added_tokens_decoder truncation_side
        model_max_length max_len split_special_tokens add_bos_token add_eos_token
        do_word_tokenize do_subword_tokenize word_tokenizer_type subword_tokenizer_type
        mecab_kwargs sudachi_kwargs jumanpp_kwargs never_split do_basic_tokenize keep_accents
        remove_space split_by_punct sp_model_kwargs legacy vocab_type wordpieces_prefix
        add_dummy_prefix_space clean_text unk_id fix_mistral_regex model_specific_special_tokens
        vocab_size do_normalize lowercase
        """),
    harmless=_words("""
        name_or_path special_tokens_map_file tokenizer_file vocab_file merges_file use_fast
        model_input_names padding_side max_length stride truncation_strategy pad_to_multiple_of
        pad_token_type_id pad_token_id clean_up_tokenization_spaces processor_class backend is_local
        local_files_only from_slow errors chat_template verbose full_tokenizer_file
        spaces_between_special_tokens use_default_system_prompt add_generation_prompt auto_map
        return_token_type_ids return_tensors init_inputs padding truncation
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output device
        response_template response_schema chat_control_tokens cls_token_box sep_token_box
        pad_token_box pad_token_label only_label_first_subword separate_vocabs
        """),
)
"""tokenizer_config.json; all that is taken is applied as transformers does."""

ADAPTER = Keys(
    taken=_words("""
        base_model_name_or_path peft_type r lora_alpha target_modules fan_in_fan_out bias use_rslora
        use_dora rank_pattern alpha_pattern modules_to_save layers_to_transform layers_pattern
        exclude_modules lora_bias target_parameters task_type
        """),
    harmless=_words("""
        auto_mapping inference_mode init_lora_weights lora_dropout megatron_config megatron_core
        loftq_config peft_version revision runtime_config ensure_weight_tying eva_config
        corda_config qalora_group_size lora_ga_config
        """),
    neutral={
        "use_qalora": (False, None),
        "trainable_token_indices": (None,),
        "layer_replication": (None,),
        "arrow_config": (None,),
        "alora_invocation_tokens": (None,),
        "use_bdlora": (None, False),
        **dict.fromkeys(["kasa_config", "monteclora_config", "velora_config"], (None,)),
    },
)
"""adapter_config.json of a LoRA folder; `peft` reads it."""
