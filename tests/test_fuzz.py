"""Bytes of valid files are flipped: opening and reading must end in an error sentence or in frames, and soon.

The HDF5 library itself may crash or hang on a damaged file. The reading therefore happens in a process of its own; when
that dies or falls silent, the last call in it is looked up. Inside h5py it is counted and reported; anywhere else it is
a defect."""

import faulthandler
import multiprocessing
import os
import queue
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

FLIPS = int(os.environ.get("FUZZ_FLIPS", 500))  # per layout
SECONDS = 20  # for one file; reading it whole takes milliseconds

rng = np.random.default_rng(0)
u = rng.normal(size=(3, 6, 8, 8)).astype(np.float32)  # n, t, h, w
t = 0.1 * np.arange(6)


def in_h5(path: Path, arrays: dict, attributes: dict | None = None):
    import h5py

    with h5py.File(path, "w") as f:
        for name, values in arrays.items():
            f[name] = values
        for (where, name), value in (attributes or {}).items():
            f.require_group(where).attrs[name] = value


def mat(path: Path, compressed: bool):
    import scipy.io

    path.mkdir()
    for k in range(6):
        scipy.io.savemat(path / f"{k}.mat", {"Omega": u[0, k], "time": t[k]}, do_compression=compressed)


def in_zarr(path: Path):
    import zarr

    group = zarr.open_group(path, mode="w")
    group.create_array("u", data=u, chunks=(1, 3, 8, 8), dimension_names=("member", "time", "y", "x"))
    group.create_array("time", data=t, dimension_names=("time",))


def in_netcdf(path: Path, engine: str):
    import xarray

    xarray.Dataset({"u": (("time", "y", "x"), u[0])}, coords={"time": t}).to_netcdf(path, engine=engine)


LAYOUTS = {
    "ours.h5": lambda p: in_h5(p, {"fields/u": u, "coordinates/time": t, "parameters/nu": np.ones(3)}),
    "well.h5": lambda p: in_h5(p, {"t0_fields/u": u, "dimensions/time": t}, {("dimensions", "spatial_dims"): ["x", "y"]}),
    "pdebench.h5": lambda p: in_h5(p, {"tensor": u, "t-coordinate": t}),
    "groups.h5": lambda p: in_h5(p, {f"{i:04}/data": u[i, ..., None] for i in range(3)} | {f"{i:04}/grid/t": t for i in range(3)}),
    "zebra.h5": lambda p: in_h5(p, {"train/states": u.transpose(0, 2, 3, 1)[:, None], "train/mu": np.ones(3)}),
    "mat5": lambda p: mat(p, False),
    "mat5_packed": lambda p: mat(p, True),
    "fno.mat": lambda p: in_h5(p, {"u": u.transpose(0, 2, 3, 1).T}),
    "array.npy": lambda p: np.save(p, u[0]),
    "arrays.npz": lambda p: np.savez(p, u=u[0], time=t),
    "packed.npz": lambda p: np.savez_compressed(p, u=u[0], time=t),
    "store.zarr": in_zarr,
    "three.nc": lambda p: in_netcdf(p, "scipy"),
    "four.nc": lambda p: in_netcdf(p, "h5netcdf"),
}  # fmt: skip


def read_all(path: Path) -> str:
    "What comes of opening `path` and reading every frame: `read`, `refused`, or what went wrong."
    from zebra_nb.core import InputError
    from zebra_nb.data import open_fields

    try:
        ds = open_fields(path)
        ds._repr_markdown_()
        for i, length in enumerate(ds.lengths[:8]):
            frames = ds.frames(i, 0, 64)
            if (
                frames.shape != (min(length, 64), *ds.field_shape)
                or frames.dtype != np.float32
                or not np.isfinite(frames).all()
            ):
                return f"frames of shape {frames.shape} and type {frames.dtype}, promised {length} of {ds.field_shape}"
        return "read"
    except InputError as e:
        return "refused" if str(e) and "\n" not in str(e) else f"a sentence of several lines: {e}"
    except BaseException as e:
        return f"{type(e).__name__}: {e}"


def serve(todo, done, log: Path):
    "The life of the process that reads: at most 4 GB of addresses more than at birth; `log` gets its last words."
    import resource

    words = open(log, "w")
    sys.unraisablehook = lambda _: None  # what libraries complain of when half-opened files are dropped
    faulthandler.enable(words)
    faulthandler.register(signal.SIGUSR1, words)
    warnings.simplefilter("ignore")
    read_all(Path("nowhere"))  # imports everything
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        if Path("/proc/self/statm").exists()
        else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30,) * 2)
    done.put("ready")
    while (path := todo.get()) is not None:
        done.put(read_all(path))


class Reader:
    "A process that reads files one at a time, replaced when it dies or falls silent."

    def __init__(self, log: Path):
        self.context, self.log, self.lost = multiprocessing.get_context("spawn"), log, []
        self.start()

    def start(self):
        self.todo, self.done = self.context.Queue(), self.context.Queue()
        self.process = self.context.Process(target=serve, args=(self.todo, self.done, self.log), daemon=True)
        self.process.start()
        assert self.answer(120) == "ready"

    def answer(self, seconds: float) -> str:
        "What the process says; `crashed` or `endless` where it says nothing."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                return self.done.get(timeout=0.05)
            except queue.Empty:
                if not self.process.is_alive():
                    return "crashed"
        return "endless"

    def read(self, path: Path) -> str:
        self.todo.put(path)
        answer = self.answer(SECONDS)
        if answer in ("crashed", "endless"):
            if answer == "endless":
                os.kill(self.process.pid, signal.SIGUSR1)
                time.sleep(0.5)
            mine = [part for part in self.log.read_text().split("hread 0x") if "in read_all" in part]  # of all threads
            where = mine[-1].split('File "')[1].split('"')[0] if mine else "nowhere"
            self.stop()
            self.start()
            answer = f"{answer} in HDF5" if "h5py" in where else f"{answer} in {where}"
            self.lost.append(f"{path.name} {answer}")
        return answer

    def stop(self):
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    made = Reader(tmp_path_factory.mktemp("log") / "words.txt")
    yield made
    made.stop()
    if made.lost:
        warnings.warn(
            f"{len(made.lost)} damaged files were too much for a library: {', '.join(made.lost)}", stacklevel=1
        )


@pytest.mark.parametrize("name", LAYOUTS)
def test_flipped_bytes(name, reader, tmp_path):
    whole, damaged = tmp_path / "whole" / name, tmp_path / "damaged" / name
    whole.parent.mkdir()
    damaged.parent.mkdir()
    LAYOUTS[name](whole)
    assert reader.read(whole) == "read"
    draw = random.Random(name)
    files = [whole] if whole.is_file() else sorted(p for p in whole.rglob("*") if p.is_file())
    shutil.copytree(whole, damaged) if whole.is_dir() else shutil.copy(whole, damaged)
    outcomes = []
    for _ in range(FLIPS):
        victim = draw.choice(files)
        data = bytearray(victim.read_bytes())
        for _ in range(draw.choice((1, 1, 1, 4, 16))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        target = damaged / victim.relative_to(whole) if whole.is_dir() else damaged
        target.unlink()
        target.write_bytes(data)
        os.utime(target, ns=(len(outcomes) + 1, len(outcomes) + 1))  # never taken for the file before
        outcomes.append(reader.read(damaged))
        target.write_bytes(victim.read_bytes())
    lost = [o for o in outcomes if o in ("crashed in HDF5", "endless in HDF5")]
    wrong = sorted(set(outcomes) - {"read", "refused", *lost})
    assert not wrong, wrong[:5]
    assert "refused" in outcomes  # the damage was felt
    print(f"{name}: {outcomes.count('read')} read, {outcomes.count('refused')} refused, {len(lost)} lost in HDF5")
