"""An ingest into a server where things go wrong: the end is exact, in bounded time.

The server is the contract server of `tests/support` behind the official client; see its docstring
for what that proves.
"""

from __future__ import annotations

import json
import time
import warnings

import pytest
from faults import EVERY_FAULT, FaultPlan
from hashing_encoder import HashingEncoder
from qdrant_contract_server import QdrantContractServer

from vdr_db.connectors.qdrant.store import QdrantStore
from vdr_db.errors import ConfigError, StoreError, StoreUnavailable
from vdr_db.ingest import IngestOptions, RecordSource, RetryPolicy, ingest
from vdr_db.readers import Record

SECRET = "s3cr3t-value-42"
QUICK = RetryPolicy(base_s=0.01, cap_s=0.2, deadline_s=30)
BATCH = 16
PROTOCOLS = ["rest", "grpc"]
PATTERNS = {
    "1 %": {"bursts": (50, 1)},
    "10 %": {"rate": 0.1},
    "bursts": {"bursts": (25, 4)},
}


def records(count):
    return [Record(f"d{i}", f"text {i}", {"n": i}, f"corpus.jsonl:{i + 1}") for i in range(count)]


def open_store(server, protocol, *, timeout=1, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client warns of keys without TLS, also on loopback
        return QdrantStore(
            "articles",
            url=server.url,
            prefer_grpc=protocol == "grpc",
            timeout=timeout,
            client_options={"grpc_port": server.grpc_port},
            **more,
        )


def assert_exact(server, protocol, items):
    server.faults.operations = ()
    # No fault is waited for here, and a machine with much to do may take its second.
    with open_store(server, protocol, timeout=60) as store:
        assert store.count() == len(items)
        found = store.get([item.id for item in items], with_rows=True)
    expected = HashingEncoder(8).encode_documents([item.text for item in items])
    for i, (one, item) in enumerate(zip(found, items, strict=True)):
        assert (one.id, one.payload["n"], one.payload["text"]) == (item.id, i, item.text)
        assert one.row == expected[i]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_each_fault_ends_exact(tmp_path, fault, pattern, protocol):
    is_slow = fault in ("timeout", "429", "slow")  # each of these costs a fifth of a second or more
    items = records(800 if is_slow else 1600)
    shape = PATTERNS[pattern]
    plan = FaultPlan(
        rates={fault: shape["rate"]} if "rate" in shape else {},
        bursts=(*shape["bursts"], fault) if "bursts" in shape else None,
        hang_s=1.3,
        seed=3,
    )
    with (
        QdrantContractServer(tmp_path, faults=plan) as server,
        open_store(server, protocol) as store,
    ):
        began = time.monotonic()
        report = ingest(
            RecordSource(lambda: items, identity="corpus"),
            store,
            encoder=HashingEncoder(8),
            options=IngestOptions(retry=QUICK, batch_documents=BATCH, writers=2),
            ledger=tmp_path / "run.ledger",
        )
        took_s = time.monotonic() - began
        injected = plan.injected[fault]
        assert injected >= 1
        assert report.totals.acknowledged == len(items)
        assert report.totals.refused == 0
        assert report.verification.is_passed
        # No busy loop: what is asked again is what failed, in halves at worst.
        batches = len(items) // BATCH
        assert server.requests["upsert"] <= batches + 20 * injected
        if fault in ("reset", "503", "lost_ack"):
            assert server.requests["upsert"] <= batches + injected
            # A busy machine may add a failure of its own.
            assert report.totals.retries <= injected + 2
        assert took_s < 60
        assert_exact(server, protocol, items)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_faults_together_end_exact(tmp_path, protocol):
    items = records(1600)
    plan = FaultPlan(rates=dict.fromkeys(EVERY_FAULT, 0.02), hang_s=1.3, seed=5)
    with (
        QdrantContractServer(tmp_path, faults=plan) as server,
        open_store(server, protocol) as store,
    ):
        report = ingest(
            items,
            store,
            encoder=HashingEncoder(8),
            options=IngestOptions(retry=QUICK, batch_documents=BATCH),
        )
        assert len(plan.injected) >= 5
        assert report.verification.is_passed
        assert_exact(server, protocol, items)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_request_beyond_the_servers_limit_is_cut_until_it_fits(tmp_path, protocol):
    items = records(200)
    with (
        QdrantContractServer(tmp_path, max_body_bytes=6000) as server,
        open_store(server, protocol) as store,
    ):
        report = ingest(
            items,
            store,
            encoder=HashingEncoder(8),
            options=IngestOptions(retry=QUICK, batch_documents=100, is_verified=False),
        )
        assert report.totals.refused == 0
        assert store.count() == 200


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_document_beyond_the_servers_limit_goes_alone_into_the_quarantine(tmp_path, protocol):
    items = records(40)
    items[17] = Record("d17", "long " * 4000, {"n": 17}, "corpus.jsonl:18")
    with (
        QdrantContractServer(tmp_path, max_body_bytes=16_000) as server,
        open_store(server, protocol) as store,
    ):
        report = ingest(
            RecordSource(lambda: items, identity="corpus"),
            store,
            encoder=HashingEncoder(8),
            options=IngestOptions(retry=QUICK, is_verified=False),
            ledger=tmp_path / "run.ledger",
        )
        assert (report.totals.acknowledged, report.totals.refused) == (39, 1)
        assert store.count() == 39
        line = json.loads((tmp_path / "run.ledger.quarantine.jsonl").read_text())
        assert (line["id"], line["source"]) == ("d17", "corpus.jsonl:18")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_stays_down_ends_clearly_and_resumes_later(tmp_path, protocol):
    items = records(2000)
    policy = RetryPolicy(tries=4, base_s=0.02, cap_s=0.1, deadline_s=5)
    with QdrantContractServer(tmp_path) as server, open_store(server, protocol) as store:

        class Downing(HashingEncoder):
            def encode_documents(self, texts):
                if self.calls == 3:
                    server.is_down = True
                return super().encode_documents(texts)

        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"4 times.*acknowledged.*resume") as caught:
            ingest(
                RecordSource(lambda: items, identity="corpus"),
                store,
                encoder=Downing(8),
                options=IngestOptions(retry=policy, batch_documents=BATCH),
                ledger=tmp_path / "run.ledger",
            )
        assert time.monotonic() - began < 20
        assert caught.value.__cause__ is not None
        server.is_down = False
        report = ingest(
            RecordSource(lambda: items, identity="corpus"),
            store,
            encoder=HashingEncoder(8),
            options=IngestOptions(retry=QUICK, batch_documents=BATCH),
            ledger=tmp_path / "run.ledger",
        )
        assert report.acknowledged_in_total == 2000
        assert_exact(server, protocol, items)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_secrets_are_nowhere(tmp_path, protocol, caplog):
    items = records(100)
    plan = FaultPlan(rates={"503": 1.0})
    ledger = tmp_path / "run.ledger"
    origin = RecordSource(lambda: items, identity="corpus")
    with QdrantContractServer(tmp_path / "s", faults=plan, api_key=SECRET) as server:
        with open_store(server, protocol, api_key=SECRET) as store, caplog.at_level("DEBUG"):
            policy = RetryPolicy(tries=2, base_s=0.01, cap_s=0.01)
            with pytest.raises(StoreUnavailable) as caught:
                ingest(
                    origin,
                    store,
                    encoder=HashingEncoder(8),
                    options=IngestOptions(retry=policy),
                    ledger=ledger,
                )
            plan.rates = {}
            report = ingest(
                origin, store, encoder=HashingEncoder(8), ledger=ledger, progress="json"
            )
            assert report.totals.acknowledged == 100
        shown = [str(caught.value), repr(store), repr(report), caplog.text]
        assert SECRET not in " ".join(shown)
        with pytest.raises(StoreError) as refused:
            open_store(server, protocol, api_key="wrong-key")
        assert "wrong-key" not in str(refused.value)
    for path in tmp_path.glob("run.ledger*"):
        assert SECRET.encode() not in path.read_bytes()


def test_a_ledger_for_another_collection_is_refused(tmp_path):
    items = records(20)
    origin = RecordSource(lambda: items, identity="corpus")
    with QdrantStore("one", path=tmp_path / "one") as store:
        ingest(origin, store, encoder=HashingEncoder(8), ledger=tmp_path / "l")
    with (
        QdrantStore("two", path=tmp_path / "two") as store,
        pytest.raises(ConfigError, match=r"another store \(name one then and two now\)"),
    ):
        ingest(origin, store, encoder=HashingEncoder(8), ledger=tmp_path / "l")
