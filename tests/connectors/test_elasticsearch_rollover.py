"""Indices put in each other's place while requests get lost, others write, and processes die.

Each test is the right answer to a fault that a real server showed; they run on the stand-in and on
a real OpenSearch.
"""

from __future__ import annotations

import threading
import time

import pytest
import services
from fault_proxy import LostAnswer, Reset
from sparse_samples import zipf_rows

from vdr_db.connectors import work as works
from vdr_db.connectors.elasticsearch import indices
from vdr_db.connectors.retry import RetryPolicy
from vdr_db.errors import StoreError, StoreMismatch

WIDTH = 200
ROWS = zipf_rows(30, 10, WIDTH, seed=3)
IDS = list(range(30))


@pytest.fixture
def made(open_store):
    def make(name=None, **options):
        store = open_store(name, **options)
        store.create(WIDTH)
        return store

    return make


def flat_settings(store):
    backing = store._index.state().backing
    answer = store.transport.call("GET", f"/{backing}/_settings", params={"flat_settings": "true"})
    settings = answer.body[backing]["settings"]
    return settings.get("index.refresh_interval"), settings["index.number_of_replicas"]


def call(store, method, path, body=None, **more):
    return store.transport.call(method, path, body, **more).body


def names(store):
    return sorted(call(store, "GET", f"/{store.name}-*/_alias"))


def test_an_alias_that_moved_although_its_answer_was_lost_keeps_its_index(made, proxy):
    store = made()
    store.upsert(ROWS, IDS)
    proxy.plan(LostAnswer(), match="_aliases")
    with store.rebuild(expected=5) as fresh:
        fresh.upsert(ROWS[:5], IDS[:5])
    assert store.count() == 5
    proxy.plan(LostAnswer(), match="_aliases")
    assert store.rollover() == f"{store.name}-000003"
    assert store.count() == 5
    assert names(store) == [f"{store.name}-000003"]


def test_an_interruption_right_after_the_swap_keeps_what_is_live(made, open_store, monkeypatch):
    store = made()
    store.upsert(ROWS, IDS)
    swap = indices.swap_aliases

    def late(*arguments, **options):
        swap(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(indices, "swap_aliases", late)
    with pytest.raises(KeyboardInterrupt), store.rebuild() as fresh:
        fresh.upsert(ROWS[:1], IDS[:1])
    again = open_store(store.name)
    assert again.count() == store.count() == 1
    assert list(again.leftovers()) == [f"{store.name}-000001"]
    assert again.remove_leftovers() == [f"{store.name}-000001"]
    assert names(store) == [f"{store.name}-000002"]


def test_an_interruption_before_the_swap_removes_the_new_index(made, monkeypatch):
    store = made()
    store.upsert(ROWS, IDS)

    def never(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(indices, "swap_aliases", never)
    with pytest.raises(KeyboardInterrupt), store.rebuild() as fresh:
        fresh.upsert(ROWS[:1], IDS[:1])
    assert store.count() == 30
    assert names(store) == [f"{store.name}-000001"]


def test_a_template_takes_in_the_numbered_indices_of_its_name_alone(made, server):
    store = made(store_vectors=False)
    store.create_template()
    other = made(f"{store.name}-en")
    other.upsert(ROWS, IDS)
    other.rollover()
    assert other.count() == 30
    assert other.get([3], with_rows=True)[0].row == ROWS[3]


def test_a_template_that_changes_an_index_of_ours_is_found_out(made, open_store, server):
    if not server.is_real:
        pytest.skip("the stand-in does not merge `_source` of templates")
    name = services.unique_name()
    store = open_store(name)
    template = {
        "index_patterns": [f"{name}-*"],
        "priority": 300,
        "template": {"mappings": {"_source": {"excludes": ["vdr"]}}},
    }
    call(store, "PUT", f"/_index_template/vdr-{name}", template)
    with pytest.raises(StoreMismatch, match="another _source than asked for: a template"):
        store.create(WIDTH)
    assert call(store, "GET", f"/{name}-*/_alias") == {}


def test_a_rollover_of_an_index_that_lost_its_vectors_is_refused(open_store, made, server):
    if not server.is_real:
        pytest.skip("the stand-in does not merge `_source` of templates")
    store = made()
    store.upsert(ROWS, IDS)
    state = store._index.state()
    crippled = {**state.mapping, "_source": {"excludes": ["vdr"]}}
    body = {"mappings": crippled, "aliases": {f"{store.name}-x": {}}}
    call(store, "PUT", f"/{store.name}-000009", body)
    indices.copy_documents(store.transport, state.backing, f"{store.name}-000009")
    broken = open_store(f"{store.name}-x")
    with pytest.raises(StoreError, match="keeps no vectors"):
        broken.rollover()
    indices.refresh_index(store.transport, f"{store.name}-000009")
    with pytest.raises(StoreError, match="30 of 30 documents have other vectors"):
        indices.check_copied(store.transport, state.backing, f"{store.name}-000009", "vdr")
    assert broken.count() == 30


def test_settings_come_back_after_another_loader_was_killed(made, open_store):
    first = made(settings={"refresh_interval": "7s"})
    killed = open_store(first.name).loading()
    killed.__enter__()
    assert flat_settings(first)[0] == "-1"
    with first.loading():
        first.upsert(ROWS, IDS)
    first._index.forget()
    assert flat_settings(first) == ("7s", "0")
    assert first.count() == 30
    killed.gen.close()


@pytest.mark.parametrize("change", ["dead", "elsewhere"])
def test_whoever_opens_next_ends_the_work_of_a_killed_process(
    made, open_store, monkeypatch, change
):
    store = made(settings={"refresh_interval": "7s"})
    store.upsert(ROWS[:1], IDS[:1])
    loading = open_store(store.name).loading()
    loading.__enter__().upsert(ROWS, IDS)
    assert open_store(store.name).count() == 1  # its process is alive
    assert flat_settings(store)[0] == "-1"
    if change == "dead":
        monkeypatch.setattr(works.os, "kill", no_process)
    else:
        monkeypatch.setattr(works.socket, "gethostname", lambda: "another host")
        assert open_store(store.name).count() == 1
        monkeypatch.setattr(works, "ALIVE_S", 0.0)
    again = open_store(store.name)
    assert flat_settings(again) == ("7s", "0")
    assert again.count() == 30
    assert again._index.state().work is None
    loading.gen.close()


def no_process(*_):
    raise ProcessLookupError


def test_a_write_block_of_a_killed_rollover_goes_too(made, open_store, monkeypatch):
    store = made()
    block = indices.changed_settings(
        store.transport, store._index.state().backing, {"index.blocks.write": True}
    )
    block.__enter__()
    monkeypatch.setattr(works.os, "kill", no_process)
    again = open_store(store.name)
    assert again.upsert(ROWS, IDS).count == 30
    block.gen.close()


def test_a_live_loader_says_so(made, monkeypatch):
    store = made()
    with store.loading():
        began = work_of(store).since
        monkeypatch.setattr(works, "ALIVE_S", 0.3)
        time.sleep(0.2)
        store.upsert(ROWS, IDS)
        assert work_of(store).since > began
    assert work_of(store) is None


def work_of(store) -> works.Work | None:
    state = indices.read_state(store.transport, store.name)
    assert state is not None
    return state.work


def test_an_index_that_vanishes_in_a_rebuild_is_not_made_again_with_guessed_types(made):
    store = made()
    store.upsert(ROWS, IDS)

    def vanishing():
        with store.rebuild(expected=1) as fresh:
            indices.delete_index(store.transport, f"{store.name}-000002")
            fresh.upsert(ROWS[:1], IDS[:1])

    with pytest.raises(StoreError):
        vanishing()
    assert store.count() == 30
    assert names(store) == [f"{store.name}-000001"]
    assert store.search(ROWS[0])


def test_a_handle_opened_before_anothers_rollover_goes_on(made, open_store):
    store = made()
    store.upsert(ROWS, IDS)
    other = open_store(store.name)
    assert other.count() == 30
    for turn, work in enumerate((loaded, rebuilt, rolled)):
        store.rollover()
        work(other)
        assert store.count() == 30, turn


@pytest.mark.parametrize("keep_old", [True, False])
def test_the_later_of_two_rebuilds_at_once_changes_nothing(made, open_store, keep_old):
    store = made()
    store.upsert(ROWS, IDS)
    other = open_store(store.name)

    def overtaken():
        with store.rebuild() as fresh:
            fresh.upsert(ROWS[:1], IDS[:1])
            with other.rebuild(keep_old=keep_old) as faster:
                faster.upsert(ROWS[:7], IDS[:7])

    with pytest.raises(StoreError, match="someone else rebuilt it meanwhile"):
        overtaken()
    assert store.count() == other.count() == 7
    assert store.leftovers() == {}


def loaded(store):
    with store.loading():
        store.upsert(ROWS, IDS)


def rebuilt(store):
    with store.rebuild(expected=30) as fresh:
        fresh.upsert(ROWS, IDS)


def rolled(store):
    store.rollover()


def test_every_alias_of_an_index_moves_with_its_options(made):
    store = made()
    store.upsert(ROWS, IDS, [{"n": n} for n in IDS])
    old = store._index.state().backing
    second = f"{store.name}-view"
    few = {"filter": {"term": {"facts": '"n"=nc008000000000000'}}}
    call(store, "POST", "/_aliases", {"actions": [{"add": {"index": old, "alias": second, **few}}]})
    new = store.rollover()
    aliases = indices.aliases_of(store.transport, new)
    assert set(aliases) == {store.name, second}
    assert aliases[second].get("filter") == few["filter"]


@pytest.mark.parametrize("work", [rebuilt, rolled])
def test_writers_wait_while_an_index_is_replaced(made, open_store, work, server):
    if not server.is_real:
        pytest.skip("the stand-in knows no write block")
    store = made()
    store.upsert(ROWS, IDS)
    policy = RetryPolicy(tries=2, base_s=0.01, deadline_s=60.0)
    writer = open_store(store.name, retry=policy)
    stop, errors, written = threading.Event(), [], []

    def write():
        while not stop.is_set():
            try:
                writer.upsert(ROWS[:1], [1000 + len(written)])
            except Exception as error:
                errors.append(error)
                return
            written.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            if work is rolled:
                store.rollover()
            else:
                with store.rebuild() as fresh:
                    fresh.upsert(ROWS, IDS)
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert written
    if work is rolled:
        assert store.count() == 30 + len(written)


def test_a_rebuild_killed_at_any_request_leaves_nothing_unlisted(
    made, open_store, proxy, monkeypatch
):
    """As after kill -9: the n-th request is the last, carried out or not, and nobody cleans up."""
    store = made(retry=RetryPolicy(tries=1))
    store.upsert(ROWS, IDS)
    for work in (rebuilt, rolled):
        for last in range(0, 60, 2):
            killed = open_store(store.name, retry=RetryPolicy(tries=1))
            proxy.requests.clear()
            proxy.decide = lambda _, last=last: dies(len(proxy.requests), last)
            try:
                work(killed)
                done = True
            except Exception:
                done = False
            proxy.decide = None
            killed.close()
            with monkeypatch.context() as dead:
                dead.setattr(works.os, "kill", no_process)
                again = open_store(store.name)
                assert again.count() == 30, (work, last)
                assert again.upsert(ROWS[:1], IDS[:1]).count == 1
                live = again._index.state().backing
                assert set(names(again)) == {live, *again.leftovers()}, (work, last)
                again.remove_leftovers()
                assert names(again) == [live]
            if done:
                break
        assert done


def dies(number, last):
    if number <= last:
        return None
    return LostAnswer() if number == last + 1 and last % 4 else Reset()
