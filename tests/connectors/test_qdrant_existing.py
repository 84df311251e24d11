"""Opening collections that are on a server already: ours, and those of others."""

from __future__ import annotations

import uuid

import pytest
from store_samples import WIDTH, WordEncoder, row, rows

from vdr_db.connectors import QdrantStore, VDRQdrant
from vdr_db.errors import ConfigError, StoreError, StoreMismatch
from vdr_db.stamp import EncoderStamp

qdrant_client = pytest.importorskip("qdrant_client")
models = qdrant_client.models

STAMP = EncoderStamp("model", "tokens", "all", "mlm", "log1p_relu")
# What changes something on a server.
CHANGING = (
    "create",
    "update",
    "delete",
    "create_index",
    "delete_index",
    "change_aliases",
    "upsert",
)


@pytest.fixture
def server(tmp_path):
    from qdrant_contract_server import QdrantContractServer

    with QdrantContractServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(params=["rest", "grpc"])
def client(request, server):
    client = qdrant_client.QdrantClient(
        url=server.url,
        grpc_port=server.grpc_port,
        prefer_grpc=request.param == "grpc",
        check_compatibility=False,
        timeout=20,
    )
    yield client
    client.close()


def foreign(client, *names, texts=(), encoder=None, **options):
    """A collection as another program makes it: its own vector names, payload and ids."""
    client.create_collection(
        "foreign",
        vectors_config=options.pop("vectors_config", {}),
        sparse_vectors_config={name: models.SparseVectorParams(**options) for name in names},
    )
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, text)) for text in texts]
    points = []
    for id, text in zip(ids, texts, strict=True):
        indices, values = encoder.encode_documents([text]).row(0)
        vector = models.SparseVector(indices=indices.tolist(), values=values.tolist())
        points.append(
            models.PointStruct(
                id=id, vector={names[0]: vector}, payload={"page_content": text, "metadata": {}}
            )
        )
    if points:
        client.upsert("foreign", points, wait=True)
    return ids


def test_adopting_changes_nothing_and_finds_everything(client, server):
    encoder = WordEncoder()
    texts = ["Einstein published the theory", "Chess is a game of kings"]
    ids = foreign(client, "langchain-sparse", texts=texts, encoder=encoder)
    before, info = server.requests.copy(), client.get_collection("foreign")
    old = VDRQdrant.from_existing(
        "foreign", encoder, client=client, adopt=True, text_key="page_content"
    )
    hits = old.search("theory published")
    assert ([hit.id for hit in hits], hits[0].payload["page_content"]) == ([ids[0]], texts[0])
    assert old.count() == 2
    # Its points have UUIDs of version 5, which this library would never give to a caller's id.
    assert [record.id for record in old.get(ids)] == ids
    terms = old.explain("theory published", ids[0])
    assert sum(term.product for term in terms) == pytest.approx(hits[0].score, rel=1e-6)
    assert old.get(ids, with_rows=True)[1].row == encoder.encode_documents(texts)[1]
    assert [[h.id for h in one] for one in old.search_batch(["kings", "theory"])] == [
        [ids[1]],
        [ids[0]],
    ]
    assert list(old.ids()) == sorted(ids)
    for operation in CHANGING:
        assert server.requests[operation] == before[operation]
    assert client.get_collection("foreign") == info
    old.add_texts(["Paris is the capital of France"], ["paris"])
    assert [hit.id for hit in old.search("capital")] == ["paris"]
    assert old.delete([ids[0], "paris"]) == 2
    assert old.count() == 1


def test_one_without_a_description_is_refused_with_the_way_to_adopt_it(client):
    foreign(client, "sparse")
    with pytest.raises(StoreMismatch, match=r"does not tell which model .* pass adopt=True"):
        VDRQdrant.from_existing("foreign", WordEncoder(), client=client)
    with pytest.raises(StoreMismatch, match="`from_existing`"):
        VDRQdrant("foreign", WordEncoder(), client=client)
    with pytest.raises(ConfigError, match="pass the encoder, or width"):
        VDRQdrant.from_existing("foreign", client=client, adopt=True)
    assert VDRQdrant.from_existing("foreign", client=client, adopt=True, width=9).store.width == 9


def test_one_that_is_not_there_is_not_made(client, server):
    with pytest.raises(StoreError, match="is not there; check its name"):
        VDRQdrant.from_existing("nothing", WordEncoder(), client=client, adopt=True)
    assert server.requests["create"] == 0


def test_which_sparse_vector(client):
    foreign(client, "title", "body")
    with pytest.raises(StoreMismatch, match="its sparse vectors are: 'body', 'title'; name one"):
        QdrantStore.from_existing("foreign", client=client, adopt=True, width=WIDTH)
    with pytest.raises(StoreMismatch, match="no sparse vector 'abstract'"):
        QdrantStore.from_existing(
            "foreign", client=client, adopt=True, width=WIDTH, vector_name="abstract"
        )
    body = QdrantStore.from_existing(
        "foreign", client=client, adopt=True, width=WIDTH, vector_name="body"
    )
    body.upsert(row({3: 1.0}), ["x"])
    title = QdrantStore.from_existing(
        "foreign", client=client, adopt=True, width=WIDTH, vector_name="title"
    )
    assert len(body.search(row({3: 1.0}))) == 1
    assert title.search(row({3: 1.0})) == []


def test_without_any_sparse_vector(client):
    foreign(client, vectors_config={"text": models.VectorParams(size=2, distance="Cosine")})
    with pytest.raises(StoreMismatch, match="its sparse vectors are: none"):
        QdrantStore.from_existing("foreign", client=client, adopt=True, width=WIDTH)


def test_what_cannot_be_the_encoders_is_refused(client):
    texts = ["Einstein published the theory"]
    foreign(client, "sparse", texts=texts, encoder=WordEncoder())
    small = WordEncoder("small", tokens=("[PAD]", "chess"))
    with pytest.raises(StoreMismatch, match=r"the index \d+, the vocabulary has 2 tokens"):
        VDRQdrant.from_existing("foreign", small, client=client, adopt=True)


def test_weights_that_a_server_multiplies_are_refused(client):
    foreign(client, "sparse", modifier=models.Modifier.IDF)
    with pytest.raises(StoreMismatch, match="multiplies weights by idf"):
        QdrantStore.from_existing("foreign", client=client, adopt=True, width=WIDTH)


def test_our_own_are_checked_as_ever_and_left_as_they_are(client, server):
    encoder = WordEncoder()
    with VDRQdrant("ours", encoder, client=client, payload_indexes={"n": "integer"}) as made:
        made.add_texts(["Chess is a game"], ["c"])
    client.delete_payload_index("ours", "n")
    before = server.requests.copy()
    again = VDRQdrant.from_existing("ours", encoder, client=client)
    assert [hit.id for hit in again.search("chess")] == ["c"]
    assert again.store.stamp == encoder.stamp()
    for operation in CHANGING:
        assert server.requests[operation] == before[operation]
    with pytest.raises(StoreMismatch, match="cannot be opened"):
        VDRQdrant.from_existing(
            "ours", WordEncoder("x", tokens=("[PAD]", "y")), client=client, adopt=True
        )


def test_the_callers_name_of_the_sparse_vector(client):
    store = QdrantStore("named", client=client, vector_name="text-sparse", versioned=True)
    store.create(WIDTH, STAMP)
    store.upsert(rows(3), [1, 2, 3])
    again = QdrantStore("named", client=client)
    assert again.get([2], with_rows=True)[0].row == rows(3)[1]
    assert again.search(rows(3)[0]) == store.search(rows(3)[0])
    with pytest.raises(StoreMismatch, match="has the sparse vector 'text-sparse', not 'vdr'"):
        QdrantStore("named", client=client, vector_name="vdr")
    with store.rebuild() as fresh:
        fresh.upsert(rows(2), [1, 2])
    assert QdrantStore("named", client=client).count() == 2
    with pytest.raises(ConfigError, match="`vector_name` goes with"):
        QdrantStore("named", path=":memory:", vector_name="x")


def test_an_adopted_collection_behind_an_alias_becomes_one_of_ours_by_a_rebuild(client):
    encoder = WordEncoder()
    foreign(client, "sparse", texts=["chess of kings"], encoder=encoder)
    alias = models.CreateAlias(collection_name="foreign", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    live = VDRQdrant.from_existing("live", encoder, client=client, adopt=True)
    with live.rebuild(expected=1, keep_old=True) as fresh:
        fresh.add_texts(["chess of kings"], ["c"])
    assert VDRQdrant("live", encoder, client=client).search("chess")[0].id == "c"
    assert client.count("foreign").count == 1


def test_a_copy_of_an_adopted_collection_keeps_its_points(client):
    encoder = WordEncoder()
    ids = foreign(client, "sparse", texts=["chess of kings", "go stones"], encoder=encoder)
    alias = models.CreateAlias(collection_name="foreign", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    live = VDRQdrant.from_existing("live", encoder, client=client, adopt=True)
    live.rollover()
    ours = VDRQdrant("live", encoder, client=client)
    assert [record.id for record in ours.get(ids)] == ids


def test_adopt_does_not_change_how_our_own_ids_are_read(client):
    encoder, name = WordEncoder(), str(uuid.uuid5(uuid.NAMESPACE_URL, "a caller's own"))
    with VDRQdrant("ours", encoder, client=client) as made:
        made.add_texts(["chess"], [name])
    again = VDRQdrant.from_existing("ours", encoder, client=client, adopt=True)
    assert [record.id for record in again.get([name])] == [name]
    assert again.delete([name]) == 1
