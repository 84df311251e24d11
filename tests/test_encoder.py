"""`SparseEncoder`: known vectors, independence of the batch, and every kind of bad input."""

from __future__ import annotations

import random
import threading
import warnings

import numpy as np
import pytest
import torch
from model_folders import write_bert, write_roberta

from vdr_db.checkpoints.tokenizers import read_tokenizer
from vdr_db.connectors import Collection, MemoryStore
from vdr_db.encoders.text import SparseEncoder
from vdr_db.errors import ConfigError, InputError
from vdr_db.sparse import SparseRows
from vdr_db.towers import text_body as body

# Printed by an independent run of the same model with log(1 + relu) and max over positions.
KNOWN_TEXT = "a cat is laying next to a blue book"
KNOWN = {
    "cat": 2.27,
    "next": 2.25,
    "blue": 2.15,
    "cats": 1.71,
    "book": 1.69,
    "laying": 1.53,
    "colors": 1.29,
    "lying": 1.25,
    "lay": 1.02,
    "books": 0.44,
    "bring": 0.21,
    "hawk": 0.21,
    "egg": 0.19,
    "nails": 0.02,
}
TEXTS = ["the cat paints a blue book", "dog", "", "theory of light and heavy water", "  \n\t"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def encoder(folder):
    return SparseEncoder.from_pretrained(folder)


def load(folder, **options):
    return SparseEncoder.from_pretrained(folder, **options)


def random_texts(encoder: SparseEncoder, count: int, seed: int, longest: int) -> list[str]:
    chooser = random.Random(seed)
    words = [token for token in encoder.vocabulary.tokens if token.isalpha()]
    lengths = [
        chooser.choice([0, 1, 2, 3, 7, 15, 16, 17, longest // 2, longest]) for _ in range(count)
    ]
    return [" ".join(chooser.choices(words, k=length)) for length in lengths]


# Known values


def test_the_trained_model_gives_its_known_vector(tiny_splade):
    (terms,) = tiny_splade.encode_documents([KNOWN_TEXT]).top_terms(100, tiny_splade.vocabulary)
    assert {term: round(weight, 2) for term, weight in terms} == KNOWN
    assert tiny_splade.encode_queries([KNOWN_TEXT]) == tiny_splade.encode_documents([KNOWN_TEXT])


# A vector depends on its text alone


def assert_independent_of_the_batch(encoder: SparseEncoder, texts: list[str]) -> None:
    rows = encoder.encode_documents(texts)
    alone = SparseRows.concat([encoder.encode_documents([text]) for text in texts])
    assert alone == rows, "one by one"
    for seed, budget in enumerate((1, 40, 300, 100_000)):
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        shuffled = encoder.encode_documents([texts[i] for i in order], token_budget=budget)
        assert shuffled == rows[order], f"shuffled, at most {budget} tokens a batch"


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_every_bit_depends_on_the_text_alone(tiny_splade):
    assert_independent_of_the_batch(tiny_splade, random_texts(tiny_splade, 60, 1, 600))


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    ("threads", "heads", "activation"),
    # An odd number of threads cuts rows in the middle, where vector instructions leave a rest.
    # Narrow heads put the work spaces of attention's threads off the cache lines.
    [
        (1, 2, "gelu"),
        (2, 2, "gelu"),
        (2, 8, "gelu"),
        (3, 2, "gelu"),
        (3, 8, "gelu"),
        (3, 2, "gelu_new"),
        (3, 2, "relu"),
        (3, 2, "silu"),
    ],
)
def test_every_bit_depends_on_the_text_alone_with_any_threads(tmp_path, threads, heads, activation):
    encoder = load(
        write_bert(
            tmp_path / "bert",
            hidden_act=activation,
            hidden_size=64,
            intermediate_size=136,
            num_attention_heads=heads,
        )
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_independent_of_the_batch(encoder, random_texts(encoder, 24, 2, 30))
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    "options",
    [
        {"head": "vdr", "k": 50, "lexical": True},
        {"head": "vdr", "k": 50, "vocabulary": "ascii_from_999"},
        {"precision": "bfloat16"},
        {"dtype": torch.float64},
        {"compatibility": "max_length"},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_every_bit_depends_on_the_text_alone_with_any_option(folder, options):
    encoder = load(folder, **options)
    encoder.norm = "head" in options
    assert_independent_of_the_batch(encoder, random_texts(encoder, 30, 3, 30))


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_where_packing_is_not_exact_texts_go_one_by_one(encoder, monkeypatch):
    texts = random_texts(encoder, 12, 4, 30)
    rows = encoder.encode_documents(texts)
    sizes = []
    monkeypatch.setattr("vdr_db.towers.text.packing_is_exact", lambda config, dtype: False)
    monkeypatch.setattr(
        encoder.document_tower,
        "forward",
        lambda *args, forward=encoder.document_tower.forward, **rest: (
            sizes.append(args[3]) or forward(*args, **rest)
        ),
    )
    assert encoder.encode_documents(texts) == rows
    assert all(sum(run.count for run in runs) <= 2 for runs in sizes)


def test_the_packed_body_agrees_with_padded_attention(encoder, monkeypatch):
    rows = encoder.encode_documents(TEXTS).to_scipy().toarray()

    def padded(query, key, value, runs, heads, *, dropout, padding):
        padding = body.Padding.of(runs, query.device)
        return attend(query, key, value, runs, heads, padding=padding)

    attend = body.attend
    monkeypatch.setattr(body, "attend", padded)
    np.testing.assert_allclose(
        encoder.encode_documents(TEXTS).to_scipy().toarray(), rows, atol=1e-5
    )


# Texts without content


def test_no_texts_give_no_rows(encoder):
    for encode in (encoder.encode_documents, encoder.encode_queries, encoder.bag_of_tokens):
        assert encode([]) == SparseRows.empty(0, encoder.vocabulary.size)


def test_texts_without_tokens_get_empty_rows_in_their_place(encoder):
    rows = encoder.encode_documents(TEXTS)
    assert (rows.counts > 0).tolist() == [True, True, False, True, False]
    assert encoder.encode_documents(["", " "]) == SparseRows.empty(2, encoder.vocabulary.size)
    assert encoder.bag_of_tokens(TEXTS).counts.tolist() == [7, 1, 0, 6, 0]


def test_a_text_of_unknown_characters_only_is_a_text(encoder):
    assert encoder.encode_documents(["\U0001f600"]).counts[0] > 0
    assert encoder.bag_of_tokens(["\U0001f600"]).counts[0] == 0


def test_mixed_scripts_and_emoji_pass(tiny_splade):
    texts = [
        "日本語 и English",
        "👩‍👩‍👧‍👦 family",
        "مرحبا",
        "e\u0301 combining",
        "\x00\x01",
        "a\u200bb",
    ]
    rows = tiny_splade.encode_documents(texts)
    assert len(rows) == len(texts)
    assert rows.counts[1] > 0


# Refused input


@pytest.mark.parametrize("method", ["encode_documents", "encode_queries", "bag_of_tokens"])
def test_one_text_instead_of_a_list_says_how_to_mend_it(encoder, method):
    encode = getattr(encoder, method)
    with pytest.raises(TypeError, match=r"got one str; pass \[text\]"):
        encode("cat")
    with pytest.raises(TypeError, match="got one bytes"):
        encode(b"cat")
    with pytest.raises(TypeError, match="got dict"):
        encode({"a": "cat"})
    with pytest.raises(TypeError, match="got NoneType"):
        encode(None)
    with pytest.raises(InputError, match="got NoneType at index 1"):
        encode(["cat", None])
    with pytest.raises(InputError, match="got float at index 0"):
        encode([float("nan")])


def test_a_lone_surrogate_is_refused_by_name(encoder):
    with pytest.raises(InputError, match=r"text 2 holds a lone surrogate \(U\+D83D at character 3"):
        encoder.encode_documents(["a", "é", "cat\ud83d"])


def test_any_iterable_of_texts_will_do(encoder):
    rows = encoder.encode_documents(TEXTS)
    assert encoder.encode_documents(text for text in TEXTS) == rows
    assert encoder.encode_documents(np.array(TEXTS)) == rows


@pytest.mark.parametrize("k", [0, -1, 1129, True, 2.5])
def test_an_impossible_k_is_refused(folder, k):
    with pytest.raises(ConfigError, match=r"`k` must be None or an integer in \[1, 1128\]"):
        load(folder, k=k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 41}, r"`max_length` must be an integer in \[3, 40\], got 41"),
        ({"max_length": 2}, "got 2"),
        ({"query_max_length": 99}, "got 99"),
        ({"query_max_length": 0}, "got 0"),
        ({"activation": "relu"}, "`activation` must be one of"),
        ({"backend": "cuda"}, "`backend` must be one of"),
        ({"compatibility": "left"}, "`compatibility` must be"),
        ({"dtype": "int8"}, "`dtype` must be a float dtype"),
        ({"dtype": "float31"}, "`dtype` must be a float dtype"),
        ({"head": "splade"}, "`head` must be 'mlm' for this folder"),
        ({"vocabulary": "some"}, "`kind` must be one of"),
        ({"device": "abacus"}, "`device` must be one .* got 'abacus'"),
    ],
)
def test_impossible_options_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)


@pytest.mark.parametrize("budget", [0, -5, 1.5, True])
def test_an_impossible_budget_is_refused(encoder, budget):
    with pytest.raises(ConfigError, match="`token_budget` must be"):
        encoder.encode_documents(TEXTS, token_budget=budget)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_broken_weights_are_an_error_that_names_the_text(tmp_path, value, backend):
    encoder = load(write_bert(tmp_path / "m"), backend=backend)
    dog = encoder.token_ids("dog")[0]
    with torch.no_grad():
        encoder.document_tower.body.embeddings.word.weight[dog, 0] = value
    assert encoder.encode_documents([""]).nnz == 0
    with pytest.raises(ConfigError, match="the vector of text 1 must be finite"):
        encoder.encode_documents(["", "dog"])


# Length


@pytest.mark.parametrize("call", ["encode_documents", "encode_queries", "bag_of_tokens", "add"])
def test_a_warning_of_cut_texts_points_at_the_caller(folder, call):
    encoder = SparseEncoder.from_pretrained(folder, max_length=4)
    with Collection(MemoryStore(), encoder) as notes:
        run = notes.add_texts if call == "add" else getattr(encoder, call)
        with pytest.warns(UserWarning, match="Add long texts with passages=True") as told:
            run(["one two three four five six seven"])
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("name", ["https://host.example/dog.jpg", "http://h.example/a/b.PNG"])
def test_the_address_of_an_image_is_told_from_a_text(folder, name):
    encoder = SparseEncoder.from_pretrained(folder)
    with pytest.warns(UserWarning, match="text 0 is the address of an image") as told:
        encoder.encode_queries([name])
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_queries([f"what is at {name}", "https://host.example/page.html"])


def test_integers_of_numpy_are_numbers(folder):
    encoder = SparseEncoder.from_pretrained(folder, max_length=np.int64(8), k=np.int32(5))
    plain = SparseEncoder.from_pretrained(folder, max_length=8, k=5)
    assert encoder.encode_documents(["the cat sat"]) == plain.encode_documents(["the cat sat"])
    with pytest.raises(ConfigError, match="`max_length` must be an integer"):
        SparseEncoder.from_pretrained(folder, max_length=8.0).encode_documents(["a"])
    with pytest.raises(ConfigError, match="`k` must be None or an integer"):
        SparseEncoder.from_pretrained(folder, k=True).encode_documents(["a"])


def test_truncation_is_counted_and_told_once(folder):
    encoder = load(folder, max_length=8)
    long = "cat " * 30
    with pytest.warns(UserWarning, match="2 texts are longer than 8 tokens and were cut"):
        rows = encoder.encode_documents([long, "dog", long])
    encoder.encode_queries([long])  # a second warning would be an error here
    assert encoder.truncated == 3
    assert rows[0] == encoder.encode_documents(["cat " * 6])[0]
    assert encoder.truncated == 3
    assert encoder.bag_of_tokens(["cat " * 6 + "dog"]) == encoder.bag_of_tokens(["cat"])
    assert encoder.truncated == 4


def test_cutting_a_bag_of_tokens_is_told_too(folder):
    encoder = load(folder, max_length=8)
    with pytest.warns(UserWarning, match="1 texts are longer") as caught:
        encoder.bag_of_tokens(["cat " * 30])
    assert caught[0].filename == __file__
    encoder = load(folder, max_length=8)
    with pytest.warns(UserWarning, match="1 texts are longer") as caught:
        encoder.encode_queries(["cat " * 30])
    assert caught[0].filename == __file__


def test_query_and_document_lengths_may_differ(folder):
    encoder = load(folder, max_length=12, query_max_length=6)
    assert (encoder.document_entry.max_length, encoder.query_entry.max_length) == (12, 6)
    with pytest.warns(UserWarning, match="longer than 6 tokens"):
        query = encoder.encode_queries(["the cat and the dog and the book"])
    assert query == encoder.encode_documents(["the cat and the"])


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, "é 1 " * 25_000], ids=len)
def test_a_huge_text_is_cut_in_no_time(tiny_splade_folder, text):
    encoder = load(tiny_splade_folder)
    if text[0] == "x":  # one word of 100,000 letters is one unknown word
        assert len(encoder.token_ids(text)) == 1
        assert encoder.encode_documents([text]).counts[0] >= 0
        return
    with pytest.warns(UserWarning, match="1 texts are longer than 512 tokens"):
        assert encoder.encode_documents([text]).counts[0] > 0


def test_a_text_larger_than_the_budget_stands_alone(encoder):
    rows = encoder.encode_documents(TEXTS)
    assert encoder.encode_documents(TEXTS, token_budget=1) == rows


# Options


def test_k_keeps_the_largest_weights(folder):
    every = load(folder).encode_documents(TEXTS)
    few = load(folder, k=7, query_k=3)
    assert few.encode_documents(TEXTS) == every.topk(7)
    assert few.encode_queries(TEXTS) == every.topk(3)


def test_lexical_keeps_the_texts_own_tokens(folder):
    encoder = load(folder, head="vdr", k=5, lexical=True)
    rows = encoder.encode_documents(TEXTS)
    bags = encoder.bag_of_tokens(TEXTS)
    plain = load(folder, head="vdr", k=5).encode_documents(TEXTS)
    for i in range(len(TEXTS)):
        expected = {*plain.row(i)[0], *bags.row(i)[0]}
        assert set(rows.row(i)[0]) == expected


def test_norm_is_taken_over_the_whole_row_before_selection(folder):
    whole = load(folder, head="vdr", k=None)
    encoder = load(folder, head="vdr", k=20)
    encoder.norm = True
    rows = encoder.encode_documents(TEXTS).to_scipy().toarray()
    every = whole.encode_documents(TEXTS).to_scipy().toarray().astype(np.float64)
    for row, full in zip(rows, every, strict=True):
        kept = np.flatnonzero(row)
        assert kept.size in (0, 20)
        np.testing.assert_allclose(row[kept], full[kept] / max(np.linalg.norm(full), 1), rtol=1e-5)
        assert np.linalg.norm(row) < 1


def test_a_new_vdr_head_has_all_weights_positive(folder):
    encoder = load(folder, head="vdr", k=None)
    rows = encoder.encode_documents(["cat"])
    assert rows.counts[0] == encoder.vocabulary.columns == 129
    assert rows.indices.min() == 999


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float16", 2e-2), ("bfloat16", 2e-1), ("float64", 1e-5)]
)
def test_other_dtypes_stay_close(folder, encoder, dtype, atol):
    other = load(folder, **{"precision" if dtype == "bfloat16" else "dtype": dtype})
    assert other.dtype == getattr(torch, dtype)
    rows = other.encode_documents(TEXTS)
    assert rows.values.dtype == np.float32
    near = encoder.encode_documents(TEXTS).to_scipy().toarray()
    np.testing.assert_allclose(rows.to_scipy().toarray(), near, atol=atol)


def test_backends_agree(folder, encoder):
    rows = load(folder, backend="reference").encode_documents(TEXTS)
    near = encoder.encode_documents(TEXTS).to_scipy().toarray()
    np.testing.assert_allclose(rows.to_scipy().toarray(), near, atol=1e-5)


def test_roberta_positions_begin_after_padding(tmp_path):
    encoder = load(write_roberta(tmp_path / "roberta"))
    assert encoder.document_entry.max_length == 88
    with pytest.warns(UserWarning, match="longer than 88 tokens"):
        encoder.encode_documents(["cat " * 200])


# Identity and manners


def test_stamp_follows_the_weights(folder):
    encoder = load(folder)
    stamp = encoder.stamp()
    assert stamp.tokenizer == encoder.vocabulary.fingerprint
    assert (stamp.head, stamp.activation, stamp.vocabulary) == ("mlm", "log1p_relu", "all")
    assert load(folder).stamp() == stamp
    assert not stamp.difference(load(folder, precision="bfloat16").stamp()), "rounding is no change"
    with torch.no_grad():
        encoder.document_tower.head.bias[3] += 1
    (reason,) = stamp.difference(encoder.stamp())
    assert reason.startswith("weights digest")
    encoder.document_tower.load_state_dict(load(folder).document_tower.state_dict(), assign=True)
    assert encoder.stamp() == stamp


def test_loading_under_inference_mode_makes_ordinary_weights(folder):
    with torch.inference_mode():
        encoder = load(folder)
    assert encoder.stamp() == load(folder).stamp()
    assert not encoder.document_tower.head.bias.is_inference()


def test_progress_goes_to_stderr_and_only_when_asked(encoder, capsys):
    encoder.encode_documents(TEXTS)
    assert capsys.readouterr() == ("", "")
    encoder.encode_documents(TEXTS, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5/5" in captured.err


def test_encoding_leaves_training_mode_and_gradients_as_they_were(encoder):
    encoder.document_tower.train()
    try:
        rows = encoder.encode_documents(TEXTS)
        assert encoder.document_tower.training
    finally:
        encoder.document_tower.eval()
    assert rows == encoder.encode_documents(TEXTS)
    assert torch.is_grad_enabled()


def test_towers_train_through_the_packed_path(folder):
    encoder = load(folder, head="vdr", k=10)
    from vdr_db.encoders.batching import pack

    batch = pack(encoder.tokenizer.encode(TEXTS[:2]), np.arange(2), encoder.frame("document"))
    pooled = encoder.document_tower(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.position_ids),
        torch.from_numpy(batch.cu_seqlens),
        batch.runs,
    )
    pooled.logits[:2].sum().backward()
    lacking = [n for n, p in encoder.document_tower.named_parameters() if p.grad is None]
    assert not lacking


def test_threads_share_an_encoder(encoder):
    rows = encoder.encode_documents(TEXTS)
    results = []

    def work() -> None:
        results.extend(encoder.encode_documents(TEXTS) == rows for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_repr_tells_what_it_is(encoder):
    assert "head='mlm'" in repr(encoder)
    assert "1128 columns, k=all, float32 on cpu" in repr(encoder)


def test_a_tokenizers_own_limits_do_not_matter(folder):
    # its file asks for truncation at 12 and padding to 16
    tokens = read_tokenizer(folder).encode(["cat " * 30, "dog"])
    assert tokens.lengths.tolist() == [30, 1]
