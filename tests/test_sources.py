"""What only another process, or another user, can do to a file."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from zebra_nb.core import InputError
from zebra_nb.data import open_fields

HOLD = """
import sys, h5py
f = h5py.File(sys.argv[1], "r+")
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    with h5py.File(tmp_path / "run.h5", "w") as f:
        f["fields/u"] = np.ones((4, 8, 8), np.float32)
    return tmp_path / "run.h5"


def test_a_file_that_is_being_written(path):
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "open\n"
    with pytest.raises(InputError, match="run.h5' is being written by another process"):
        open_fields(path)
    writer.communicate("")
    assert open_fields(path).lengths == (4,)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no user numbers")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_permission(path, what):
    target = path if what == "file" else path.parent
    mode, user = target.stat().st_mode, os.geteuid()
    path.parent.chmod(0o755)
    target.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)  # root may read everything
        with pytest.raises(InputError, match="may not be read: ask its owner"):
            open_fields(target)
    finally:
        os.seteuid(user)
        target.chmod(mode)
