"""A disk that is full, broken, read-only or gone, at each single operation; and checkpoints that have been damaged."""

import contextlib
import ctypes
import dataclasses
import errno
import faulthandler
import gc
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

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float
from small_run import CONFIG, Child, rows, same_end, sessions, untrained

from zebra_nb.checkpoints import Checkpoints, checkpointed
from zebra_nb.core import AbstractConfig, AbstractModel, InputError
from zebra_nb.model_files import load, named_leaves
from zebra_nb.quantizer import QuantizerConfig
from zebra_nb.sessions import Session

PATIENCE = 30  # seconds for one trial
SHORT = dict(max_steps=12)
MODEL = {"model": "EMACodebook", "module": "zebra_nb.codebook", "config": {"dim": 8}}


@dataclasses.dataclass(frozen=True)
class NumberConfig(AbstractConfig):
    start: float = 1.0


class Number(AbstractModel):
    "The smallest model; a step halves it."

    value: Float[Array, ""]
    config: NumberConfig = eqx.field(static=True)
    config_class = NumberConfig

    def __init__(self, config: NumberConfig, *, key=None):
        self.value, self.config = jnp.float32(config.start), config


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


def sitting(out: Path, last: int = 8, resume: bool = True):
    "A session that trains `Number`, with a record after each step, a checkpoint after every second, and the model at the end."
    config = dataclasses.replace(CONFIG, max_steps=8, keep=1)
    with Session(out, Number(NumberConfig()), config, resume=resume) as session:
        model, first = session.restore(Number(NumberConfig()))
        for step in range(first + 1, last + 1):
            model = eqx.tree_at(lambda m: m.value, model, model.value / 2)
            session.step = step
            session.log({"step": step, "value": float(model.value)})
            if step % 2 == 0:
                session.keep(step, model, metric=1 / step)
                session.checkpoints.wait()  # so that the operations come in the same order every time
        if last == 8:
            session.store(model)


def session_trial(disk: Disk, home: Path, n: int, error: int, stays: bool) -> dict[str, Any]:
    "The second sitting of a run, with a failure in it; and a third one."
    out = home / f"sitting {n}"
    shutil.copytree(home / "begun", out)
    disk.fail(out, n, error, stays)
    said = sentence(sitting, out)
    done = disk.mend()
    found = {"n": n, "said": said, "operation": done["operations"][n - 1 : n], **done}
    found |= {"value": not said and float(load(out / "model.safetensors").value)}
    found |= {
        "later": sentence(sitting, out),
        "value later": float(load(out / "model.safetensors").value),
        "rows": rows(out),
    }
    found |= {"files": sorted(p.name for p in out.iterdir()), "ended": [s["ended"] for s in sessions(out)]}
    return {k: v for k, v in found.items() if k != "operations"}


TRIALS = {"checkpoints": trial, "sessions": session_trial}


def operations_of_a_session(disk: Disk, home: Path) -> list[str]:
    "What the second sitting of a run does to the disk."
    shutil.copytree(home / "begun", home / "counted")
    disk.fail(home / "counted", 0, 0, False)
    sitting(home / "counted")
    return disk.mend()["operations"]


def trials(disk: Disk, home: Path, what: str, *series: str):
    "Prints a line of JSON for each trial of each series: `error:stays:first:step` says which operations fail; of a session, all that are not a checkpoint's, too."
    first = open_kept(home / "good")
    save_at(first, 10)
    first.close()
    sitting(home / "begun", last=4, resume=False)
    done = operations_of_a_session(disk, home)
    others = [n for n, name in enumerate(done, 1) if "/checkpoints/" not in name] if what == "sessions" else []
    for error, stays, start, step in (map(int, one.split(":")) for one in series):
        for n in sorted({*range(start, 1000, step), *others}):
            found = TRIALS[what](disk, home, n, error, bool(stays))
            print(json.dumps(found | {"error": error}), flush=True)
            shutil.rmtree(home / f"sitting {n}", ignore_errors=True)
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
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def explained(words: str, reason: str) -> bool:
    "Whether these words are one sentence that names the reason, and no traceback."
    return f"({reason})" in words and "\n" not in words and "Traceback" not in words


def test_a_disk_that_fails_while_a_checkpoint_is_written(library: Path, tmp_path: Path):
    "Whichever operation fails: the new checkpoint is whole, or one sentence says why not and the old one is whole; the process goes on, and ends."
    series = f"{errno.ENOSPC}:1:1:1 {errno.ENOSPC}:0:1:9 {errno.EIO}:0:5:9 {errno.EROFS}:1:3:9".split()
    found = in_a_child(library, "checkpoints", tmp_path, *series)
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


def test_a_disk_that_fails_during_a_run(library: Path, tmp_path: Path):
    "Whatever fails of history, record, checkpoints and model: one sentence, and the next session ends the run as if nothing had been."
    series = f"{errno.ENOSPC}:1:1:16 {errno.EIO}:0:5:32".split()
    found = in_a_child(library, "sessions", tmp_path, *series)
    for one in found:
        assert not one["said"] or explained(one["said"], os.strerror(one["error"])), one
        assert one["said"] or one["value"] == 0.5**8, one
        assert not one["later"] and one["value later"] == 0.5**8, one
        assert one["rows"] == [{"step": i, "value": 0.5**i} for i in range(1, 9)], one
        assert one["files"] == [".lock", "checkpoints", "history.jsonl", "model.safetensors", "run.json"], one
        assert one["ended"][0] == one["ended"][-1] == "finished", one
    assert sum(bool(one["said"]) for one in found) > 20
    touched = " ".join(name for one in found for name in one["operation"])
    assert all(name in touched for name in ("/history.jsonl", "/.run.", "/.model.", "/checkpoints/")), touched


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    "A short run that nobody touched."
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Child(out, cache=cache, options=SHORT).end(120) == (0, "finished")
    return out


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    "A file system of four megabytes."
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def begun(out: Path, cache: Path) -> Child:
    "A run that has a checkpoint, and goes on slowly."
    child = Child(out, cache=cache, options=SHORT, pause=0.1)
    child.wait_until((out / "checkpoints/3").exists)
    return child


def test_a_full_disk(small_disk: Path, undisturbed: Path, cache: Path):
    "The run stops with one sentence; where there is room again, it ends as if nothing had been."
    out, ballast = small_disk / "run", small_disk / "ballast"
    child = begun(out, cache)
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, words = child.end()
    assert code == 2 and explained(words, os.strerror(errno.ENOSPC)) and "is whole: mend this and resume" in words
    code, words = Child(out, cache=cache, options=SHORT, resume=True).end()
    assert code == 2 and explained(words, os.strerror(errno.ENOSPC))
    ballast.unlink()
    assert Child(out, cache=cache, options=SHORT, resume=True).end() == (0, "finished")
    assert same_end(out, undisturbed)


def test_a_folder_that_cannot_be_written(small_disk: Path, cache: Path):
    "The run does not begin, and one sentence says why."
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, words = Child(small_disk / "run", cache=cache, options=SHORT).end()
    assert code == 2 and explained(words, os.strerror(errno.EROFS))


def test_a_folder_that_is_moved_away(undisturbed: Path, cache: Path, tmp_path: Path):
    "The run stops with one sentence, and makes no new folder; from the other place, it goes on as if nothing had been."
    child = begun(tmp_path / "run", cache)
    (tmp_path / "run").rename(tmp_path / "moved")
    code, words = child.end()
    assert code == 2 and "Traceback" not in words and "\n" not in words and str(tmp_path / "run") in words, words
    assert not (tmp_path / "run").exists()
    assert checkpointed(tmp_path / "moved", 3).config == untrained().config
    assert Child(tmp_path / "moved", cache=cache, options=SHORT, resume=True).end() == (0, "finished")
    assert same_end(tmp_path / "moved", undisturbed)


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "gone": None,
    **{f"byte {k}/4": lambda data, k=k: flipped(data, k * (len(data) - 1) // 4) for k in range(5)},
}


def flipped(data: bytes, at: int) -> bytes:
    "`data` with the lowest bit of one byte turned over."
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    "A file of the newest checkpoint cut, emptied, gone or with a bit turned over: the newest numbers, or the ones before with a warning, never others."
    written = Checkpoints(tmp_path / "good")
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
    gc.collect()  # of tasks that nobody has waited for
    assert "Traceback" not in caplog.text
    assert [step for step, _ in outcomes.values()].count(10) > 30  # the others do not matter
    assert all(
        step == 10 for (file, _), (step, _) in outcomes.items() if "about/metadata" in file or "state/d/" in file
    )


def test_the_arrays_of_another_step(tmp_path: Path):
    "Whole files with other numbers in them, as a folder put together by hand has: the checksum tells."
    written = Checkpoints(tmp_path)
    for step in (10, 20):
        save_at(written, step)
    written.close()
    shutil.rmtree(tmp_path / "20/state")
    shutil.copytree(tmp_path / "10/state", tmp_path / "20/state")
    with pytest.warns(UserWarning, match="the checkpoint of step 20 in .* is damaged"):
        assert kept(tmp_path) == (10, True)


if __name__ == "__main__":
    what, library, home, *arguments = sys.argv[1:]
    trials(Disk(library), Path(home), what, *arguments)
