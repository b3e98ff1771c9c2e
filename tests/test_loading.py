"""Reading ahead in a process of its own: worker processes, and Ctrl-C while a thread reads."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

MAIN = "\nif __name__ == '__main__':\n    main()\n"
WORKERS = """
import sys
import numpy as np
from zebra_nb.core import InputError
from zebra_nb.data import open_fields
from zebra_nb.loading import Loader

def main():
    source = open_fields(sys.argv[1]).windows(2)
    options = dict(seed=3, shuffle=sys.argv[2] == "shuffled")
    threads, workers = (Loader(source, 4, **options, **w) for w in (dict(threads=1), dict(workers=2)))
    try:
        for k, batch in enumerate(workers.iterate(5, 15)):
            assert type(batch) is np.ndarray and (batch == threads[5 + k]).all()
            print("batch", k, flush=True)
    except InputError as e:
        raise SystemExit(str(e))
"""
SLOW = """
import sys, time
from zebra_nb.loading import Loader

class Slow:
    def __len__(self):
        return 1000

    def __getitem__(self, j):
        time.sleep(0.2)
        return j

def main():
    for batch in Loader(Slow(), 2, threads=2):
        print("batch", flush=True)
"""


def start(folder: Path, script: str, *arguments: object) -> subprocess.Popen:
    "`script` as a program of its own."
    (folder / "script.py").write_text(script)
    command = [sys.executable, str(folder / "script.py"), *map(str, arguments)]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a background job would ignore, and hand down
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def write(path: Path, bad: int | None = None) -> Path:
    "Sixty frames; frame `bad` holds a NaN."
    frames = np.random.default_rng(0).normal(size=(60, 8, 8)).astype(np.float32)
    if bad is not None:
        frames[bad, 3, 3] = np.nan
    with h5py.File(path, "w") as f:
        f["fields/omega"] = frames
    return path


@pytest.mark.parametrize(
    ("bad", "guard", "batches", "told"),
    [
        (None, MAIN, 10, ""),
        (45, MAIN, 6, "frame 45 of"),
        (None, "\nmain()\n", 0, "if __name__ == '__main__'"),
    ],
)
def test_worker_processes(tmp_path: Path, bad: int | None, guard: str, batches: int, told: str):
    "They deliver what threads deliver, pass on a bad frame's sentence, and say what a script needs."
    path = write(tmp_path / "flow.h5", bad)
    program = start(tmp_path, WORKERS + guard, path, "shuffled" if bad is None else "in order")
    out, err = program.communicate(timeout=120)
    assert out.count("batch") == batches, err[-2000:]
    assert program.returncode == (1 if told else 0), err[-2000:]
    assert told in err and ("Traceback" in err) == (guard != MAIN), err[-2000:]


def test_interrupt(tmp_path: Path):
    "Ctrl-C ends a program whose threads are reading, within the time of a batch or two."
    program = start(tmp_path, SLOW + MAIN)
    assert program.stdout.readline() == "batch\n"
    begin = time.perf_counter()
    program.send_signal(signal.SIGINT)
    _, err = program.communicate(timeout=30)
    assert "KeyboardInterrupt" in err and time.perf_counter() - begin < 10
