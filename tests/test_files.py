"""What every room reads and writes files with."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.files import read_json, replacing, same_content, stamp, write_json, writing


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, 1)
    with pytest.raises(ValueError), replacing(file) as temporary:  # noqa: PT011, PT012
        Path(temporary).write_text("half")
        raise ValueError
    assert file.read_text() == "1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_does_not_follow_a_link_that_lies_in_wait(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file = tmp_path / "shared" / "a.json"
    file.parent.mkdir()
    for name in ("a.json.tmp", ".a.json.0123456789abcdef.tmp"):
        (file.parent / name).symlink_to(victim)
    write_json(file, 1)
    assert victim.read_text() == "precious"
    assert file.read_text() == "1\n"


def test_what_a_kill_left_goes_with_the_next_write(tmp_path: Path) -> None:
    left = tmp_path / ".a.json.0123456789abcdef.tmp"
    other = tmp_path / ".b.json.0123456789abcdef.tmp"
    left.write_text("half")
    other.write_text("of another file")
    write_json(tmp_path / "a.json", 1)
    assert not left.exists()
    assert other.exists()


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """On a full disk the system says why, but not which file."""
    says = pytest.raises(UserError, match=r"a\.png cannot be written \(No space left on device\)\. Make room\.")
    with says, writing("Make room."), replacing(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    says = pytest.raises(UserError, match=r"/nowhere/a\.json cannot be found or written \(No such file or directory\)")
    with says, writing("Make room."):
        write_json(tmp_path / "nowhere" / "a.json", 1)
    with (
        pytest.raises(UserError, match=r"/other cannot be found or written"),
        writing(""),
        replacing(tmp_path / "a.png"),
    ):
        (tmp_path / "nowhere" / "other").touch()
    assert not list(tmp_path.iterdir())


def test_a_new_file_has_the_rights_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b'{"seed": 1', "not JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"null", "holds null, not an object"),
        (b"{}", "has nothing under 'seed', not a whole number"),
        (b'{"seed": "1"}', "has a text under 'seed'"),
        (b'{"seed": \xff}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_json_in_the_wrong_shape_is_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(file, "Delete it.", keys={"seed": int})
    assert str(file) in str(error.value)
    assert says in str(error.value)
    assert str(error.value).endswith("Delete it.")


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert read_json(tmp_path / "a.json", "", keys={"seed": int}) == {"seed": 1}


def test_a_folder_and_a_missing_file_are_sentences(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="cannot be read"):
            read_json(path, "Mend it.")


def test_a_copy_holds_the_same_and_another_content_does_not(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"content")
    kept = stamp(file)
    copy = tmp_path / "copy"
    shutil.copy(file, copy)
    os.utime(copy, ns=(1, 1))
    assert same_content(stamp(copy), kept)
    copy.write_bytes(b"CONTENT")
    assert not same_content(stamp(copy), kept)


def test_a_content_is_read_again_only_where_size_or_time_are_others(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"content")
    kept = stamp(file)
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(kept[1], kept[1]))
    assert stamp(file, kept) == kept  # the price of not reading
    file.write_bytes(b"content")
    os.utime(file, ns=(1, 1))
    now = stamp(file, kept)
    assert now == [7, 1, kept[2]]
    assert same_content(now, kept)
    assert not same_content(now, [7, 1, "another"])
