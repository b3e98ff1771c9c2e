"""An ensemble that is killed while it is made: said again, the command completes it, and no bit is different."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

CODE = """
import dataclasses, sys
from zebra_nb.ensembles import simulate_ensemble
from zebra_nb.systems import preset

zebra = preset("decaying-zebra")
system = dataclasses.replace(zebra.system, num_points=32)
small = dataclasses.replace(zebra, system=system, n_frames=10, per_environment=3, refine=1)
simulate_ensemble(small, 60, sys.argv[1], batch_size=2, shard_size=4, seed=5, progress=False)
"""


def start(out: Path) -> subprocess.Popen:
    "A process that makes the ensemble in `out`."
    return subprocess.Popen([sys.executable, "-c", CODE, str(out)], env={**os.environ, "JAX_PLATFORMS": "cpu"})


def arrays(path: Path) -> dict[str, np.ndarray]:
    "All arrays of a file, by name."
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The ensemble, made without interruption."
    out = tmp_path_factory.mktemp("whole") / "ensemble"
    assert start(out).wait() == 0
    return out


def test_a_killed_run_is_completed(whole: Path, tmp_path: Path):
    "SIGKILL in the middle leaves whole shards only; the next run keeps them, makes the others, and all bits agree."
    out = tmp_path / "ensemble"
    process = start(out)
    while not list(out.glob("shard-*.h5")):
        assert process.poll() is None, "the run ended before it had a shard"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.h5")}
    index = json.loads((out / "index.json").read_text())
    assert 1 <= len(survived) < len(index["shards"])
    assert start(out).wait() == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert {name: (out / name).stat().st_mtime_ns for name in survived} == survived
    for shard in index["shards"]:
        made, expected = arrays(out / shard["file"]), arrays(whole / shard["file"])
        assert made.keys() == expected.keys() and len(made["fields/omega"]) == shard["count"]
        assert all(np.array_equal(made[name], expected[name]) for name in expected), shard
