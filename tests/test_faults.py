"""A disk that is full, broken, read-only or gone, at each single operation; and checkpoints that have been damaged."""

import ctypes
import errno
import faulthandler
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zebra_nb.checkpoints import Checkpoints
from zebra_nb.core import InputError, named_leaves
from zebra_nb.quantizer import QuantizerConfig

PATIENCE = 30  # seconds for one trial
MODEL = {"model": "EMACodebook", "module": "zebra_nb.quantizer", "config": {"dim": 8}}


def state_at(step: int) -> dict[str, Any]:
    "A state with numbers of its own at every step, and few arrays, so that it is written quickly."
    book = QuantizerConfig(dim=8).codebook(16, key=jax.random.key(0))
    return {"book": jax.tree.map(lambda x: x + step, book), "step": jnp.int32(step)}


def about(step: int) -> dict[str, Any]:
    return {"model": MODEL, "position": step}


def open_kept(folder: Path) -> Checkpoints:
    "The checkpoints of `folder`, of which only the newest is kept."
    return Checkpoints(folder, keep=1, keep_best=0)


def kept(folder: Path) -> tuple[int, bool]:
    "Step of the newest whole checkpoint, and whether its numbers are to the bit those of that step."
    checkpoints = Checkpoints(folder)
    try:
        state, told = checkpoints.restore(state_at(0), MODEL)
    finally:
        checkpoints.close()
    step = told["position"]
    pairs = zip(named_leaves(state).values(), named_leaves(state_at(step)).values())
    return step, told["step"] == step and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# The trials are made in a process of their own, in which the disk can fail.


class Disk:
    "What `failing_disk.c` offers to the process that it is loaded into."

    def __init__(self, library: str):
        self.library = ctypes.CDLL(library)
        self.library.operations.restype = ctypes.c_char_p

    def fail(self, folder: Path, n: int, error: int, stays: bool):
        "Lets the `n`-th operation in `folder` fail, and all that follow where it `stays`."
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        self.library.arm(str(folder).encode(), n, error, int(stays))

    def mend(self) -> dict[str, Any]:
        "Lets nothing fail any more; says what was done and how much of it failed."
        faulthandler.cancel_dump_traceback_later()
        count, failed = self.library.disarm(), self.library.failed()
        return {"count": count, "failed": failed, "operations": self.library.operations().decode().splitlines()}


def sentence(action, *arguments) -> str:
    "What an `InputError` says, empty where there was none; the last line of a traceback for anything else."
    try:
        action(*arguments)
        return ""
    except InputError as e:
        return str(e)
    except BaseException as e:
        return f"Traceback: {type(e).__name__}: {e}"


def save_at(checkpoints: Checkpoints, step: int):
    checkpoints.save(step, state_at(step), about(step))
    checkpoints.wait()


def trial(disk: Disk, home: Path, n: int, error: int, stays: bool) -> dict[str, Any]:
    "One save with a failure in it, into a folder that has a good checkpoint of step 10; and a save after it."
    folder, copy = home / f"trial {n}", home / f"copy {n}"
    shutil.copytree(home / "good", folder)
    checkpoints = open_kept(folder)
    disk.fail(folder, n, error, stays)
    said = sentence(save_at, checkpoints, 20)
    done = disk.mend()
    subprocess.run(["cp", "-r", folder, copy], stderr=subprocess.DEVNULL)  # what was failed may still be cleared away
    found = {"n": n, "said": said, "kept": kept(copy), "operation": done["operations"][n - 1 : n], **done}
    found |= {"later": sentence(save_at, checkpoints, 30), "closed": sentence(checkpoints.close)}
    found |= {"kept later": kept(folder), "files": sorted(p.name for p in folder.iterdir())}
    shutil.rmtree(folder, ignore_errors=True)  # threads of what has failed may still be at work
    shutil.rmtree(copy)
    return {k: v for k, v in found.items() if k != "operations"}


def trials(disk: Disk, home: Path, *series: str):
    "Prints a line of JSON for each trial of each series: `error:stays:first:step` says which operations fail, until there are no more."
    first = open_kept(home / "good")
    save_at(first, 10)
    first.close()
    for error, stays, start, step in (map(int, one.split(":")) for one in series):
        for n in range(start, 1000, step):
            found = trial(disk, home, n, error, bool(stays))
            print(json.dumps(found | {"error": error}), flush=True)
            if n > found["count"] + 5:
                break


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The disk that fails, compiled."
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("letting a disk fail needs Linux and a C compiler")
    path = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    source = Path(__file__).with_name("failing_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl", "-lpthread"], check=True)
    return path


def in_a_child(library: Path, what: str, home: Path, *arguments: object) -> list[dict[str, Any]]:
    "The lines that this file prints when it is run, with the failing disk, as a program of its own."
    command = [sys.executable, __file__, what, library, home, *arguments]
    cached = {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**cached, **os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def explained(words: str, reason: str) -> bool:
    "Whether these words are one sentence that names the reason, and no traceback."
    return f"({reason})" in words and "\n" not in words and "Traceback" not in words


def test_a_disk_that_fails_while_a_checkpoint_is_written(library: Path, tmp_path: Path):
    "Whichever operation fails: the new checkpoint is whole, or one sentence says why not and the old one is whole; the process goes on, and ends."
    series = f"{errno.ENOSPC}:1:1:1 {errno.ENOSPC}:0:1:9 {errno.EIO}:0:5:9 {errno.EROFS}:1:3:9".split()
    found = in_a_child(library, "trials", tmp_path, *series)
    kinds = {name for one in found for name in (one["operation"] or [""])[0].split()[:1]}
    assert {"mkdir", "open", "write", "writev", "fsync", "rename", "unlinkat", "rmdir"} <= kinds, kinds
    assert sum("/state" in one["operation"][0] for one in found if one["operation"]) > 30  # tensorstore's among them
    for one in found:
        reason = os.strerror(one["error"])
        step, same = one["kept"]
        assert same and step == 20 if not one["said"] else same and step in (10, 20), one
        assert not one["said"] or explained(one["said"], reason) and f"of step {step} is whole" in one["said"], one
        assert one["said"] or not one["failed"] or step == 20, one
        assert one["kept later"] == ([one["kept"][0], True] if one["later"] else [30, True]), one
        assert not one["later"] or explained(one["later"], reason), one
        assert not one["closed"], one
    assert sum(bool(one["said"]) for one in found) > 100 and sum(not one["failed"] for one in found) >= 4


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "gone": None,
    **{f"byte {k}/4": lambda data, k=k: flipped(data, k * (len(data) - 1) // 4) for k in range(5)},
}


def flipped(data: bytes, at: int) -> bytes:
    "`data` with the lowest bit of one byte turned over."
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage(tmp_path: Path):
    "A file of the newest checkpoint cut, emptied, gone or with a bit turned over: the newest numbers, or the ones before with a warning, never others."
    written, before = Checkpoints(tmp_path / "good"), {}
    for step in (10, 20):
        written.save(step, state_at(step), about(step), metric=1 / step)
        written.wait()
    written.close()
    files = [p.relative_to(tmp_path / "good") for p in sorted((tmp_path / "good/20").rglob("*")) if p.is_file()]
    outcomes = {}
    for i, (file, (name, damage)) in enumerate(itertools.product(files, DAMAGES.items())):
        place = tmp_path / f"copy {i}"
        shutil.copytree(tmp_path / "good", place)
        data = (place / file).read_bytes()
        (place / file).unlink() if damage is None else (place / file).write_bytes(damage(data) if data else b"x")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                step, same = kept(place)
            except InputError as e:
                step, same = None, True
                said.append(str(e))
        outcomes[str(file), name] = (step, [str(w) for w in said])
        assert same and (step == 20 or step == 10 and said or step is None), (file, name, step, same)
        shutil.rmtree(place)
    for k, v in outcomes.items(): print(k, v)


if __name__ == "__main__":
    what, library, home, *arguments = sys.argv[1:]
    {"trials": trials}[what](Disk(library), Path(home), *arguments)
