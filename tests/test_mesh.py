"""The chain on eight virtual devices, and in two processes of four, against the run on one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from zebra_nb.checkpoints import steps_in
from zebra_nb.token_files import TokenDataset

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def start(script: str, *arguments: object, devices: int, rank: int = 0, processes: int = 1, port: int = 0, log: Path):
    "A Python process with virtual devices, one of a job of so many, that runs a function of `mesh_jobs`."
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": rank}
    more = {"JAX_NUM_CPU_DEVICES": devices, **(job if processes > 1 else {})}
    code = f"import sys, mesh_jobs; mesh_jobs.{script}(*sys.argv[1:])"
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=os.environ | ENVIRONMENT | {k: str(v) for k, v in more.items()}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(script: str, *arguments: object, folder: Path, devices: int, processes: int = 1) -> list[subprocess.Popen]:
    "The processes of a job; what they print goes to `folder`."
    port, folder = free_port(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(devices=devices, processes=processes, port=port)
    return [start(script, *arguments, rank=i, log=folder / f"{script}-{i}.log", **options) for i in range(processes)]


def finish(processes: list[subprocess.Popen], folder: Path, seconds: float = 400) -> None:
    "Waits until all have ended well."
    end = time.monotonic() + seconds
    codes = [p.wait(max(1, end - time.monotonic())) for p in processes]
    said = "\n".join(p.read_text(errors="replace")[-1500:] for p in sorted(Path(folder).glob("*.log")))
    assert codes == [0] * len(codes), f"{codes}: {said}"


def agree(one: dict, other: dict, tolerance: float = 1e-5) -> None:
    "The arrays agree, but for the attention's bias, whose key part has no gradient but rounding errors (see `mesh_jobs`)."
    assert one.keys() == other.keys()
    for name in one:
        if not name.endswith("qkv.bias"):
            size = max(1, np.abs(one[name]).max())
            np.testing.assert_allclose(other[name], one[name], rtol=0, atol=tolerance * size, err_msg=name)


def test_steps_on_eight_devices(tmp_path: Path):
    "After three steps weights, optimiser and codebook sums are those of one device within 1e-5; a device's share of the state falls with `model`."
    finish(job("steps", tmp_path, folder=tmp_path, devices=8), tmp_path)
    states = {path.stem: dict(np.load(path)) for path in tmp_path.glob("*.npz")}
    assert sum("codebooks" in name for name in states["vqvae data=1"]) >= 6
    for name, state in states.items():
        agree(states[f"{name.split()[0]} data=1"], state)
    held = json.loads((tmp_path / "memory.json").read_text())
    assert held["vqvae data=4,model=2"] < 0.55 * held["vqvae data=8"]  # small arrays are kept whole
    assert held["nsp data=2,model=4"] < 0.33 * held["nsp data=1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Fields, and a VQ-VAE trained on them by one device: flow.h5, vqvae/."
    folder = tmp_path_factory.mktemp("alone")
    finish(job("fields", folder, folder=folder, devices=1), folder)
    finish(job("train", folder, folder, "data=1", folder=folder, devices=1), folder)
    return folder


def test_two_processes(alone: Path, tmp_path: Path):
    "Two processes of four devices train, are killed, resume, and end where one process with one device ends."
    checkpoints, command = tmp_path / "vqvae/checkpoints", ("train", alone, tmp_path, "data=4,model=2")
    running = job(*command, folder=tmp_path / "first", devices=4, processes=2)
    end = time.monotonic() + 300
    while not steps_in(checkpoints) and time.monotonic() < end:
        assert all(p.poll() is None for p in running), (tmp_path / "first/train-0.log").read_text()[-2000:]
        time.sleep(0.02)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert steps_in(checkpoints) and not (tmp_path / "vqvae/model.safetensors").exists()
    finish(job(*command, folder=tmp_path / "second", devices=4, processes=2), tmp_path / "second")
    agree(*(load_file(folder / "vqvae/model.safetensors") for folder in (alone, tmp_path)))
    sessions = json.loads((tmp_path / "vqvae/run.json").read_text())["sessions"]
    assert [s["ended"] for s in sessions] == ["killed", "finished"] and sessions[1]["from_step"] > 0


def test_what_the_first_process_refuses_all_refuse(alone: Path, tmp_path: Path):
    "A folder that holds a run is refused by both processes, with the sentence; after that they tokenize, a shard each."
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        finish(job("tokens", alone, folder, folder=folder, devices=1, processes=processes), folder)
        assert "already holds a run" in (folder / f"tokens-{processes - 1}.log").read_text()
    shards = [f"train-0000{i}-of-00002.npz" for i in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "2").glob("train*")) == [*shards, "train.json"]
    one, two = (TokenDataset(tmp_path / n / "train.npz") for n in ("1", "2"))
    for name in ("indices_flat", "trajectory", "time"):
        np.testing.assert_array_equal(getattr(two, name), getattr(one, name))
    assert two.tokenizer_hash == one.tokenizer_hash
