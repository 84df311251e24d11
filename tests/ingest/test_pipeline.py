"""What an ingest does with good input, bad input, stores that fail, and requests to stop."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hashing_encoder import HashingEncoder
from search_servers import on_opensearch

from vdr_db.connectors.memory import MemoryStore
from vdr_db.connectors.qdrant.store import QdrantStore
from vdr_db.errors import (
    ConfigError,
    InputError,
    RejectedRows,
    StoreMismatch,
    StoreUnavailable,
    VdrError,
)
from vdr_db.ingest import (
    FileSource,
    IngestOptions,
    RecordSource,
    RetryPolicy,
    Stop,
    ingest,
)
from vdr_db.ingest.progress import JsonProgress, LogProgress, choose_progress
from vdr_db.readers import Fields, Record

QUICK = RetryPolicy(base_s=0.001, cap_s=0.01, deadline_s=5.0)


@pytest.fixture(params=["memory", "OpenSearch"])
def store(request):
    """An empty store that takes anything an ingest brings."""
    if request.param == "memory":
        yield MemoryStore()
        return
    with on_opensearch(request) as store:
        yield store


def records(count, *, start=0, text="text {}"):
    return [
        Record(f"d{i}", text.format(i), {"n": i}, f"corpus.jsonl:{i + 1}")
        for i in range(start, start + count)
    ]


def source(items, identity="corpus"):
    return RecordSource(lambda: items, identity=identity)


def options(**more):
    return IngestOptions(**{"retry": QUICK, "batch_documents": 64, **more})


def assert_holds(store, items, encoder=None):
    """The store holds exactly these records, each with the row of its text."""
    encoder = encoder or HashingEncoder()
    wanted = {item.id: item for item in items}
    assert store.count() == len(wanted)
    assert set(store.ids()) == set(wanted)
    found = store.get(list(wanted), with_rows=True)
    expected = encoder.encode_documents([wanted[one.id].text for one in found])
    for i, one in enumerate(found):
        assert one.row == expected[i]
        assert one.payload["n"] == wanted[one.id].payload["n"]
        assert one.payload["text"] == wanted[one.id].text


class TroubledStore(MemoryStore):
    """A store whose writes go through `trouble(ids)` first."""

    def __init__(self, trouble, *, writers=1):
        super().__init__()
        self.trouble = trouble
        self.concurrent_writers = writers
        self.written = Counter()
        self.sizes = []
        self._writing = threading.Lock()

    def upsert(self, rows, ids, payloads=None, **more):
        self.sizes.append(len(ids))
        self.trouble(list(ids))
        with self._writing:
            self.written.update(ids)
            return super().upsert(rows, ids, payloads, **more)


def test_everything_arrives_and_the_report_counts_it(tmp_path, store):
    items = records(1000)
    report = ingest(source(items), store, encoder=HashingEncoder(), options=options())
    assert_holds(store, items)
    assert report.is_complete
    assert report.totals.read == report.totals.encoded == report.totals.acknowledged == 1000
    assert report.mean_nonzeros == 16
    assert report.documents_per_second > 0
    assert report.verification.is_passed
    assert report.verification.count == 1000
    assert report.verification.read_back == 64
    assert report.verification.searched == 8
    assert json.loads(json.dumps(report.to_dict()))["totals"]["acknowledged"] == 1000


def test_a_second_run_with_the_ledger_encodes_nothing(tmp_path, store):
    items, ledger = records(300), tmp_path / "run.ledger"
    ingest(source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger)
    encoder = HashingEncoder()
    report = ingest(source(items), store, encoder=encoder, options=options(), ledger=ledger)
    assert encoder.calls == 0
    assert report.totals.resumed == 300
    assert report.totals.acknowledged == 0
    assert report.acknowledged_in_total == 300


@pytest.mark.parametrize("change", ["encoder", "policy"])
def test_a_ledger_of_another_run_is_refused_until_restart(tmp_path, change):
    store, items, ledger = MemoryStore(), records(50), tmp_path / "run.ledger"
    ingest(source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger)
    encoder = HashingEncoder(nonzeros=8) if change == "encoder" else HashingEncoder()
    more = {"has_fingerprint": False} if change == "policy" else {}
    target = MemoryStore() if change == "encoder" else store
    with pytest.raises(ConfigError, match=r"knows this input and another (encoder|run) \(.*--rest"):
        ingest(source(items), target, encoder=encoder, options=options(**more), ledger=ledger)
    report = ingest(
        source(items),
        target,
        encoder=encoder,
        options=options(restart=True, **more),
        ledger=ledger,
    )
    assert report.totals.acknowledged == 50


def test_a_changed_file_is_refused(tmp_path, store):
    path, ledger = tmp_path / "c.jsonl", tmp_path / "run.ledger"
    path.write_text('{"_id": "a", "text": "one"}\n')
    ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
    path.write_text('{"_id": "a", "text": "one"}\n{"_id": "b", "text": "two"}\n')
    told = r"c\.jsonl has changed since \(bytes: 28 then, 56 now\); restart"
    with pytest.raises(ConfigError, match=told):
        ingest([path], store, encoder=HashingEncoder(), ledger=ledger)


def test_a_touched_file_is_the_same_and_another_file_goes_on(tmp_path):
    ledger, store = tmp_path / "run.ledger", MemoryStore()
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"_id": "a", "text": "one"}\n{"_id": "bad"}\n')
    second.write_text('{"_id": "b", "text": "two"}\n{"_id": "worse"}\n')
    ingest([first], store, encoder=HashingEncoder(), ledger=ledger)
    os.utime(first, (1, 1))
    report = ingest([first], store, encoder=HashingEncoder(), ledger=ledger)
    assert (report.totals.resumed, report.totals.acknowledged) == (2, 0)
    report = ingest([second], store, encoder=HashingEncoder(), ledger=ledger)
    assert (report.totals.resumed, report.totals.acknowledged) == (0, 1)
    assert report.acknowledged_in_total == 1, "of this input"
    # Each input has its refusals, and is taken up where it was.
    names = ("run.ledger.quarantine.jsonl", "run.ledger.2.quarantine.jsonl")
    kept = [json.loads((tmp_path / name).read_text())["source"] for name in names]
    assert kept == [f"{first}:2", f"{second}:2"]
    for path in (first, second):
        report = ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
        assert (report.totals.resumed, report.refused_in_total) == (2, 1)
    # A file of the same name elsewhere is another input, unless it is a copy.
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "a.jsonl"
    far.write_text(first.read_text())
    assert ingest([far], store, encoder=HashingEncoder(), ledger=ledger).totals.resumed == 2
    (tmp_path / "other").mkdir()
    far = tmp_path / "other" / "a.jsonl"
    far.write_text('{"_id": "far", "text": "three"}\n')
    assert ingest([far], store, encoder=HashingEncoder(), ledger=ledger).totals.acknowledged == 1
    assert store.count() == 3


def test_a_first_mistake_does_not_block_the_command_that_mends_it(tmp_path):
    path, ledger, store = tmp_path / "c.jsonl", tmp_path / "run.ledger", MemoryStore()
    path.write_text('{"_id": "a", "body": "one"}\n{"_id": "b", "body": "two"}\n')
    report = ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
    assert (report.totals.acknowledged, report.totals.refused) == (0, 2)
    mended = FileSource([path], fields=Fields(text=("body",)))
    report = ingest(mended, store, encoder=HashingEncoder(), ledger=ledger)
    assert (report.totals.acknowledged, report.refused_in_total) == (2, 0)
    path.write_text('{"_id": "a", "body": "new"}\n')
    ledger.unlink()
    mended = FileSource([path], fields=Fields(text=("body",)))
    ingest(mended, store, encoder=HashingEncoder(), ledger=ledger)
    with pytest.raises(ConfigError, match=r"its fields was .* then and is .* now"):
        ingest([path], store, encoder=HashingEncoder(), ledger=ledger)


def test_a_digest_lets_a_copied_file_resume(tmp_path, store):
    ledger = tmp_path / "run.ledger"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "c.jsonl"
        path.write_text('{"_id": "a", "text": "one"}\n')
        origin = FileSource([path], digest=True)
        report = ingest(origin, store, encoder=HashingEncoder(), ledger=ledger)
    assert report.totals.resumed == 1


def test_an_emptied_store_is_noticed_at_resume(tmp_path):
    items, ledger = records(100), tmp_path / "run.ledger"
    ingest(source(items), MemoryStore(), encoder=HashingEncoder(), ledger=ledger)
    with pytest.raises(StoreMismatch, match="another store, or it was emptied"):
        ingest(source(items), MemoryStore(), encoder=HashingEncoder(), ledger=ledger)


def test_a_stream_cannot_have_a_ledger(tmp_path, store):
    with pytest.raises(ConfigError, match="needs an input that can be recognised"):
        ingest(iter(records(3)), MemoryStore(), encoder=HashingEncoder(), ledger=tmp_path / "l")
    report = ingest(iter(records(3)), store, encoder=HashingEncoder())
    assert report.totals.acknowledged == 3


def test_one_path_is_a_type_error():
    with pytest.raises(TypeError, match="write"):
        ingest("corpus.jsonl", MemoryStore(), encoder=HashingEncoder())


def test_another_encoder_than_the_stores_is_refused(store):
    ingest(records(3), store, encoder=HashingEncoder())
    with pytest.raises(StoreMismatch):
        ingest(records(3), store, encoder=HashingEncoder(width=1000))


def test_the_last_of_equal_ids_wins():
    items = records(200)
    again = [Record("d7", "a later text", {"n": -1}), Record("d7", "the last text", {"n": -2})]
    store = TroubledStore(lambda ids: time.sleep(0.002), writers=4)
    everything = [*items, *again, *records(100, start=200), Record("d8", "also", {"n": -3})]
    report = ingest(everything, store, encoder=HashingEncoder(), options=options())
    assert store.get(["d7"])[0].payload["text"] == "the last text"
    assert store.get(["d8"])[0].payload["text"] == "also"
    assert store.count() == 300
    assert report.verification.is_passed  # fewer documents than acknowledgements, none missing


def test_existing_and_unchanged_documents_are_left_out(store):
    items = records(100)
    ingest(items, store, encoder=HashingEncoder(), options=options())
    encoder = HashingEncoder()
    report = ingest(items, store, encoder=encoder, options=options(skip="unchanged"))
    assert (report.totals.unchanged, encoder.calls) == (100, 0)
    changed = [
        *items[:97],
        Record("d97", "another text", {"n": 97}),
        Record("d98", "text 98", {"n": 98, "more": True}),
        *records(1, start=99),
        *records(5, start=100),
    ]
    report = ingest(changed, store, encoder=encoder, options=options(skip="existing"))
    assert (report.totals.existing, report.totals.acknowledged) == (100, 5)
    report = ingest(changed, store, encoder=encoder, options=options(skip="unchanged"))
    assert (report.totals.unchanged, report.totals.acknowledged) == (103, 2)
    assert store.get(["d97"])[0].payload["text"] == "another text"
    assert store.get(["d98"])[0].payload["more"] is True


def test_another_encoder_changes_the_fingerprint(tmp_path):
    marks = []
    for nonzeros in (8, 16):
        with QdrantStore("c", path=tmp_path / str(nonzeros)) as store:
            ingest(records(1), store, encoder=HashingEncoder(nonzeros))
            marks.append(store.get(["d0"])[0].payload["_vdr_fp"])
            row = store.get(["d0"], with_rows=True)[0].row
            assert "_vdr_fp" not in store.search(row)[0].payload
    assert marks[0] != marks[1]


def test_a_refused_document_does_not_take_its_neighbours(tmp_path):
    def trouble(ids):
        if "d13" in ids:
            raise InputError("unlucky")  # as a server does: the whole batch, without saying which

    store, items = TroubledStore(trouble), records(200)
    ledger = tmp_path / "run.ledger"
    report = ingest(
        source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger
    )
    assert_holds(store, [item for item in items if item.id != "d13"])
    assert report.totals.refused == 1
    assert report.totals.splits <= 8
    assert list(report.reasons.values()) == [1]
    quarantine = Path(report.quarantine)
    lines = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["source"]) for line in lines] == [("d13", "corpus.jsonl:14")]
    assert "unlucky" in lines[0]["reason"]
    again = ingest(source(items), store, encoder=HashingEncoder(), ledger=ledger)
    assert again.totals.resumed == 200
    assert len(quarantine.read_text(encoding="utf-8").splitlines()) == 1


def test_rows_a_store_names_are_quarantined_and_the_others_count(tmp_path):
    class Picky(MemoryStore):
        def upsert(self, rows, ids, payloads=None, **more):
            bad = [id for id in ids if int(id[1:]) % 10 == 0]
            keep = [i for i, id in enumerate(ids) if id not in bad]
            super().upsert(rows[keep], [ids[i] for i in keep], [payloads[i] for i in keep], **more)
            if bad:
                raise RejectedRows(bad, ["a multiple of ten"] * len(bad))

    store, items = Picky(), records(100)
    report = ingest(items, store, encoder=HashingEncoder(), options=options())
    assert (report.totals.acknowledged, report.totals.refused) == (90, 10)
    assert report.reasons == {"a multiple of ten": 10}
    assert store.count() == 90


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record("x", "text", {"_vdr_id": 1}), "must not start with"),
        (Record("x", "text", {"text": "another"}), "another value"),
        (Record("x", "text", {"bad": {1, 2}}), "JSON"),
        (Record("", "text", {}), "1 to 512 bytes"),
        (Record("x" * 600, "text", {}), "1 to 512 bytes"),
        (Record(-1, "text", {}), "integer ids"),
    ],
    ids=["reserved", "text", "json", "empty id", "long id", "negative id"],
)
def test_documents_that_no_store_can_take_are_refused_before_encoding(
    tmp_path, record, reason, store
):
    items = records(10)
    ledger = tmp_path / "run.ledger"
    report = ingest(source([*items, record]), store, encoder=HashingEncoder(), ledger=ledger)
    assert (report.totals.acknowledged, report.totals.refused) == (10, 1)
    assert reason in (tmp_path / "run.ledger.quarantine.jsonl").read_text()


def test_a_text_the_encoder_refuses_is_found_by_halving(store):
    class Picky(HashingEncoder):
        def encode_documents(self, texts):
            if any("17" in text for text in texts):
                raise InputError("weights are not finite")
            return super().encode_documents(texts)

    report = ingest(records(100), store, encoder=Picky())
    assert (report.totals.acknowledged, report.totals.refused) == (99, 1)
    assert store.count() == 99


@pytest.mark.parametrize(
    ("empty", "counts"), [("store", (4, 0, 4)), ("skip", (2, 0, 2)), ("error", (2, 2, 2))]
)
def test_empty_vectors_follow_the_policy(empty, counts, store):
    items = [Record("a", "one"), Record("b", ""), Record("c", "two"), Record("d", "")]
    report = ingest(items, store, encoder=HashingEncoder(), options=options(empty=empty))
    assert (report.totals.acknowledged, report.totals.refused, store.count()) == counts
    assert report.totals.empty == 2


def test_too_many_refusals_stop_the_ingest(tmp_path):
    def trouble(ids):
        raise InputError("wrong vector name")

    store, ledger = TroubledStore(trouble), tmp_path / "run.ledger"
    with pytest.raises(InputError, match=r"6 documents were refused, more than the 5 allowed"):
        ingest(
            source(records(1000)),
            store,
            encoder=HashingEncoder(),
            options=options(max_errors=5),
            ledger=ledger,
        )
    assert len(store.sizes) < 40
    assert len((tmp_path / "run.ledger.quarantine.jsonl").read_text().splitlines()) == 6


def test_transient_failures_are_retried_and_counted():
    chances = np.random.default_rng(1)

    def trouble(ids):
        if chances.random() < 0.3:
            raise ConnectionResetError(104, "reset")

    store, items = TroubledStore(trouble, writers=3), records(2000)
    report = ingest(items, store, encoder=HashingEncoder(), options=options())
    assert_holds(store, items)
    assert report.totals.retries > 5


def test_a_choking_store_gets_smaller_batches_and_then_larger_ones_again():
    most = [8]

    def trouble(ids):
        if len(ids) > most[0]:
            raise TimeoutError("too slow")
        if len(store.sizes) > 60:
            most[0] = 1000

    store, items = TroubledStore(trouble), records(3000)
    report = ingest(items, store, encoder=HashingEncoder(), options=options())
    assert_holds(store, items)
    assert sum(size > 8 for size in store.sizes[10:60]) <= 10  # a probe now and then
    assert max(store.sizes[-10:]) > 8
    assert report.totals.refused == 0


def test_a_store_that_never_answers_ends_with_a_clear_error_and_a_ledger(tmp_path):
    is_down = threading.Event()

    def trouble(ids):
        if is_down.is_set():
            raise ConnectionRefusedError(111, "refused")
        if len(store.written) >= 500:
            is_down.set()

    store, items, ledger = TroubledStore(trouble), records(2000), tmp_path / "run.ledger"
    policy = RetryPolicy(tries=4, base_s=0.01, cap_s=0.05, deadline_s=2)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"failed 4 times.*acknowledged; .*resume"):
        ingest(
            source(items),
            store,
            encoder=HashingEncoder(),
            options=options(retry=policy),
            ledger=ledger,
        )
    assert time.monotonic() - began < 5
    acknowledged = len(store.written)
    assert 500 <= acknowledged < 2000
    store.trouble = lambda ids: None
    report = ingest(
        source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger
    )
    assert report.totals.resumed == acknowledged  # every acknowledgement was committed
    assert_holds(store, items)
    assert max(store.written.values()) == 1


def test_no_time_is_wasted_when_the_server_asks_for_more_than_there_is():
    class Busy(ConnectionError):
        retry_after_s = 100.0

    def trouble(ids):
        raise Busy("busy")

    policy = RetryPolicy(deadline_s=2.0)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        ingest(
            records(3),
            TroubledStore(trouble),
            encoder=HashingEncoder(),
            options=options(retry=policy),
        )
    assert time.monotonic() - began < 1


class PanicException(BaseException):
    pass


def test_a_panic_stops_at_once_and_names_the_batch(tmp_path):
    def trouble(ids):
        if "d300" in ids:
            raise PanicException("index out of bounds")

    store, ledger = TroubledStore(trouble), tmp_path / "run.ledger"
    match = r"records \d+ to \d+\): PanicException.*not retried"
    with pytest.raises(VdrError, match=match) as caught:
        ingest(
            source(records(1000)),
            store,
            encoder=HashingEncoder(),
            options=options(checkpoint_documents=100),
            ledger=ledger,
        )
    assert isinstance(caught.value.__cause__, PanicException)


def test_what_failed_is_told_also_when_the_reader_waits_for_the_store():
    has_failed = threading.Event()

    class Asked(TroubledStore):
        def get(self, ids, with_rows=False):
            if self.sizes:
                has_failed.wait(10)
                time.sleep(0.2)
                raise ConnectionResetError(104, "reset")
            return super().get(ids, with_rows)

    def trouble(ids):
        has_failed.set()
        raise PanicException("index out of bounds")

    with pytest.raises(VdrError, match="not retried"):
        ingest(
            source(records(3000)),
            Asked(trouble),
            encoder=HashingEncoder(),
            options=options(skip="existing"),
        )


def test_the_queue_is_bounded_in_bytes():
    most = 0

    def trouble(ids):
        time.sleep(0.005)

    class Watching:
        def update(self, totals, *, is_last=False):
            nonlocal most
            most = max(most, totals.queued_bytes)

    store = TroubledStore(trouble)
    report = ingest(
        records(3000, text="a long text " * 50 + "{}"),
        store,
        encoder=HashingEncoder(),
        options=options(queue_bytes=200_000),
        progress=Watching(),
    )
    assert store.count() == 3000
    assert 0 < most <= 300_000  # one piece of 64 documents may exceed it
    assert report.seconds["blocked"] > 0.01


def test_a_request_to_stop_drains_and_commits(tmp_path):
    stop, items, ledger = Stop(), records(5000), tmp_path / "run.ledger"

    def trouble(ids):
        time.sleep(0.001)
        if len(store.written) >= 1000:
            stop.request()

    store = TroubledStore(trouble)

    report = ingest(
        source(items),
        store,
        encoder=HashingEncoder(),
        options=options(queue_bytes=50_000, is_verified=False),
        ledger=ledger,
        stop=_first_only(stop),
    )
    assert report.is_interrupted
    assert not report.is_complete
    assert report.totals.encoded == report.totals.acknowledged < 5000
    store.trouble = lambda ids: None
    again = ingest(source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger)
    assert again.totals.resumed == report.totals.acknowledged
    assert_holds(store, items)


def _first_only(stop):
    """The stop, but asking again changes nothing."""
    stop.request = stop._first.set
    return stop


def test_a_second_request_drops_the_queue_but_commits_what_is_acknowledged(tmp_path):
    stop, items, ledger = Stop(), records(5000), tmp_path / "run.ledger"

    def trouble(ids):
        time.sleep(0.01)
        if len(store.written) >= 500:
            stop.request()

    store = TroubledStore(trouble)
    with pytest.raises(KeyboardInterrupt):
        ingest(
            source(items),
            store,
            encoder=HashingEncoder(),
            options=options(),
            ledger=ledger,
            stop=stop,
        )
    acknowledged = len(store.written)
    assert acknowledged < 5000
    store.trouble = lambda ids: None
    again = ingest(source(items), store, encoder=HashingEncoder(), options=options(), ledger=ledger)
    assert again.totals.resumed == acknowledged
    assert_holds(store, items)


BAD_LINES = {
    "{broken": "not a line of JSON",
    "[1, 2]": "expected one JSON object a line, got a list",
    '{"_id": "x"}': "the field 'text' is missing",
    '{"_id": "x", "text": 3}': "must be a text, got the number 3",
    '{"_id": "x", "text": "x", "n": NaN}': "NaN is not a JSON number",
    '{"_id": -1, "text": "x"}': "integer ids must lie in",
    '{"_id": "x", "text": {"en": "x"}}': "name a field in it, such as text.en",
    b'{"_id": "x", "text": "caf\xe9"}': "byte 0xe9 at column 26 is not UTF-8; convert",
    '{"_id": "\\ud800", "text": "x"}': "half of a surrogate pair",
}


def test_bad_lines_go_to_the_quarantine_with_line_and_fix(tmp_path):
    path, ledger, store = tmp_path / "c.jsonl", tmp_path / "run.ledger", MemoryStore()
    lines = [json.dumps({"_id": f"d{i}", "text": f"text {i}"}).encode() for i in range(300)]
    bad = [line.encode() if isinstance(line, str) else line for line in BAD_LINES]
    path.write_bytes(b"\n".join([*lines, *bad, *lines[:1]]) + b"\n")
    report = ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
    assert report.is_complete
    assert store.count() == 300
    refused = [json.loads(line) for line in Path(report.quarantine).read_text().splitlines()]
    assert [one["source"] for one in refused] == [f"{path}:{301 + i}" for i in range(len(bad))]
    for one, told in zip(refused, BAD_LINES.values(), strict=True):
        assert told in one["reason"]
    again = ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
    assert again.totals.resumed == len(lines) + len(bad) + 1


def test_a_damaged_file_ends_the_ingest_after_what_came_before(tmp_path):
    path, ledger, store = tmp_path / "c.csv", tmp_path / "run.ledger", MemoryStore()
    rows = "".join(f"d{i},text {i}\n" for i in range(500))
    path.write_text(f'_id,text\n{rows}x,"never closed\n')
    with pytest.raises(InputError, match=r"c\.csv:502: .*are acknowledged"):
        ingest([path], store, encoder=HashingEncoder(), ledger=ledger)
    assert store.count() == 500


def test_verification_finds_what_is_missing():
    class Forgetful(MemoryStore):
        def upsert(self, rows, ids, payloads=None, **more):
            written = super().upsert(rows, ids, payloads, **more)
            self.delete([id for id in ids if id == "d5"])
            return written

    report = ingest(records(50), Forgetful(), encoder=HashingEncoder())
    assert not report.verification.is_passed
    assert any("d5" in problem for problem in report.verification.problems)


def test_progress_tells_read_encoded_and_acknowledged_apart(capsys, caplog):
    ingest(
        records(300),
        MemoryStore(),
        encoder=HashingEncoder(),
        progress=JsonProgress(every_s=0.0),
    )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {"read", "encoded", "acknowledged", "refused", "retries", "elapsed_s"} <= set(lines[0])
    assert lines[-1]["is_last"]
    assert lines[-1]["acknowledged"] == 300
    with caplog.at_level("INFO", logger="vdr_db.ingest"):
        ingest(records(3), MemoryStore(), encoder=HashingEncoder(), progress="log")
    assert "read 3, encoded 3, acknowledged 3" in caplog.text
    assert isinstance(choose_progress("auto"), LogProgress)  # no terminal here
    ingest(records(3), MemoryStore(), encoder=HashingEncoder(), progress="bar")
    assert "ingest" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="progress"):
        choose_progress("loud")


@pytest.mark.parametrize(
    "wrong",
    [
        {"documents": "words"},
        {"skip": "all"},
        {"empty": "drop"},
        {"queue_bytes": 0},
        {"writers": 0},
        {"max_errors": -1},
        {"skip": "unchanged", "has_fingerprint": False},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ConfigError):
        IngestOptions(**wrong)
