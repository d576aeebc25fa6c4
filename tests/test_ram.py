"""The RAM of a container or a job is less than the machine's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from nnunet_ssl.ram import ram_limit

GIB = 2**30
NO_LIMIT = "9223372036854771712"  # version 1 writes the largest number of pages
JOB = "slurm/uid_1000/job_7"


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        pytest.param("0::/\n", {"memory.max": f"{GIB}\n"}, GIB, id="container, version 2"),
        pytest.param(f"0::/{JOB}/step_0\n", {f"{JOB}/memory.max": f"{GIB}\n"}, GIB, id="job, version 2"),
        pytest.param(
            "0::/a/b\n", {"a/b/memory.max": f"{3 * GIB}\n", "a/memory.max": f"{2 * GIB}\n"}, 2 * GIB, id="nested"
        ),
        pytest.param("0::/a\n", {"a/memory.max": "max\n"}, None, id="no limit, version 2"),
        pytest.param(
            f"9:cpu,cpuacct:/{JOB}\n4:memory:/{JOB}\n0::/\n",
            {f"memory/{JOB}/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.limit_in_bytes": NO_LIMIT},
            GIB,
            id="job, version 1",
        ),
        pytest.param(
            "4:memory:/docker/0123\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB, id="container, version 1"
        ),
        pytest.param("0::/../../other\n", {"memory.max": f"{GIB}\n"}, GIB, id="group outside of the container"),
        pytest.param("4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT}, None, id="no limit, version 1"),
        pytest.param("0::/\n", {}, None, id="no such file"),
        pytest.param("", {}, None, id="no control groups"),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, group, files, limit, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"total": 100 * GIB}))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert ram_limit(str(tmp_path)) == (limit or 100 * GIB)


def test_here_there_is_some():
    assert 2**20 < ram_limit() <= psutil.virtual_memory().total
