"""Names of others never lead out of the folder that is meant."""

from __future__ import annotations

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.names import file_ending, path_component


@pytest.mark.parametrize("name", ["case_001", "Ä 1", "a..b", "lock", "x-y.z"])
def test_plain_names_pass(name: str) -> None:
    assert path_component(name, "case", "list.txt") == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "._x", ".hidden", "a/b", "/etc/passwd", "../../x", "a\\b", "a\0b", "a\nb", "x" * 256,
     "ä" * 128, "\udcff", 3, None, ["a"]],
)  # fmt: skip
def test_everything_else_is_a_sentence(name: object) -> None:
    with pytest.raises(UserError, match=r"list\.txt: case .*plain name"):
        path_component(name, "case", "list.txt")


@pytest.mark.parametrize("ending", [".nii.gz", ".png", ".b2nd"])
def test_endings_pass(ending: str) -> None:
    assert file_ending(ending, "dataset.json") == ending


@pytest.mark.parametrize("ending", ["", "nii", ".", "..", "./x", ".a/b", None, 1, [".nii"]])
def test_other_endings_do_not(ending: object) -> None:
    with pytest.raises(UserError, match="file_ending"):
        file_ending(ending, "dataset.json")


def test_bytes_that_are_no_text_here_are_told_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"'un_\\udce9' is not UTF-8, or this system's locale is not .set PYTHONUTF8=1"):
        path_component("un_\udce9", "case", "imagesUn")
