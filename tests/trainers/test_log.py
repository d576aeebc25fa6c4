"""The log of a run goes on where it was, and a damaged one is named before anything is trained."""

from __future__ import annotations

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.trainers.log import SSLLog

TABLE = "epoch,loss_sup,weight\n0,1.5,\n1,1.25,0.5\n2,1,1\n"


def test_rows_of_repeated_epochs_are_dropped(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "ssl_log.csv").write_text(TABLE, encoding=encoding)
        log = SSLLog(str(tmp_path), 2)
        assert log.rows == [{"epoch": 0, "loss_sup": 1.5}, {"epoch": 1, "loss_sup": 1.25, "weight": 0.5}]
    log.add(2, {"loss_sup": 0.5})
    assert (tmp_path / "ssl_log.csv").read_text().splitlines()[-1] == "2,0.5,"
    assert SSLLog(str(tmp_path)).rows == []


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,loss\n0,abc\n", b"epoch,loss\n0,1,2,3\n", b"loss\n1\n", b"epoch,loss\n,1\n", b"epoch\nnan\n",
        b"epoch\ninf\n", b"\xff\xfe\x00", b"epoch,loss\n0,\x00\n", b"epoch\n" + b"1" * 200_000, b"[1, 2]\n3\n", None,
    ],
)  # fmt: skip
def test_a_damaged_log_is_named(tmp_path, content):
    file = tmp_path / "ssl_log.csv"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} .*Fix it, or remove it"):
        SSLLog(str(tmp_path), 2)


def test_an_empty_log_has_no_rows(tmp_path):
    (tmp_path / "ssl_log.csv").write_bytes(b"")
    assert SSLLog(str(tmp_path), 2).rows == []
