"""The error tree, stamps, and what a missing extra says."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from vdr_db import EncoderStamp, errors

STAMP = EncoderStamp("m", tokenizer="t", vocabulary="all", head="vdr", activation="elu1p", k=9)


def test_every_error_is_a_vdr_error_and_drawn():
    for name in errors.__all__:
        thing = getattr(errors, name)
        if isinstance(thing, type):
            assert issubclass(thing, errors.VdrError)
            assert name in (errors.__doc__ or "")


def test_rejected_rows_name_ids_and_reasons_and_survive_pickling():
    error = errors.RejectedRows([1, "b", 3, 4], ["no", "nan", "x", "y"])
    assert "4 rows were refused (1: no; 'b': nan; 3: x; and 1 more)" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.ids, copy.reasons, str(copy)) == (error.ids, error.reasons, str(error))


def test_missing_extra_names_the_command():
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'vdr-db\[images\]'"):
        errors.require("a_package_nobody_has", "images")
    assert errors.require("json", "images").loads("1") == 1


def test_broken_installs_keep_their_own_message(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_need_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_need_nobody_has") as caught:
        errors.require("half_installed", "images")
    assert not isinstance(caught.value, errors.MissingExtraError)


def test_stamps_differ_in_what_makes_vectors_incomparable():
    assert EncoderStamp.from_dict({**STAMP.to_dict(), "newer": 1}) == STAMP
    for field, harmless in (("model", "n"), ("k", 3), ("library_version", "9"), ("revision", "r")):
        assert STAMP.difference(dataclasses.replace(STAMP, **{field: harmless})) == []
    for field in ("tokenizer", "vocabulary", "head", "activation"):
        (reason,) = STAMP.difference(dataclasses.replace(STAMP, **{field: "other"}))
        assert repr(getattr(STAMP, field)) in reason
        assert "'other'" in reason
    known = dataclasses.replace(STAMP, weights="aa")
    assert STAMP.difference(known) == known.difference(STAMP) == []
    assert len(known.difference(dataclasses.replace(STAMP, weights="bb"))) == 1


def test_damaged_stamps_are_refused():
    data = STAMP.to_dict()
    del data["tokenizer"]
    with pytest.raises(errors.ConfigError, match="`tokenizer`"):
        EncoderStamp.from_dict(data)
