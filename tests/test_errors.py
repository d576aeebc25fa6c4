"""The exception that speaks to the user."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest

from nnunet_ssl.errors import UserError


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
def test_the_same_after_a_round_trip(again) -> None:
    """As from a worker process, whose exceptions are pickled."""
    error = again(again(UserError("x.nii.gz is empty. Replace it.")))
    assert type(error) is UserError
    assert str(error) == error.code == "nnunet_ssl: x.nii.gz is empty. Replace it."


def test_ends_with_code_1_and_the_message_alone() -> None:
    program = "import copy; from nnunet_ssl.errors import UserError; raise copy.copy(UserError('Mend it.'))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, "nnunet_ssl: Mend it.\n")
