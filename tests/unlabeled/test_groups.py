"""Groups of a dataset from several files."""

from __future__ import annotations

import json

import pytest

from nnunet_ssl.unlabeled.groups import all_groups


@pytest.mark.parametrize(
    ("own", "kept", "groups"),
    [
        ({"a": "p", "b": "p"}, {}, {"a": "p", "b": "p"}),
        ({"a": "p"}, {"b": "q"}, {"a": "p", "b": "q"}),
        ({"a": "p", "b": "p"}, {"b": "q", "c": "q"}, {"a": "p", "b": "p", "c": "p", "q": "p"}),  # b is of both
        ({"a": "p", "b": "q"}, {"a": "r", "b": "r"}, {"a": "p", "b": "p", "q": "p", "r": "p"}),
        ({"a": "p"}, {"a": "b"}, {"a": "p", "b": "p"}),  # b is a patient by its own name
        ({}, {"a": "b"}, {"a": "b"}),
        ({"a": "c", "c": "d"}, {}, {"a": "c", "c": "d"}),  # a patient may have the name of another one's case
        ({"a": "c", "b": "c", "c": "d"}, {"e": "d"}, {"a": "c", "b": "c", "c": "d", "e": "d"}),
        ({}, {}, {}),
    ],
)
def test_cases_that_any_file_puts_together_are_together(monkeypatch, tmp_path, own, kept, groups):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    dataset = tmp_path / "Dataset001_X"
    dataset.mkdir()
    (dataset / "groups.json").write_text(json.dumps(own))
    (dataset / "nnUNetPlans_2d_warped_onto_labeled_groups.json").write_text(json.dumps(kept))
    assert all_groups("Dataset001_X") == groups
    assert all_groups("Dataset002_Y") == {}
