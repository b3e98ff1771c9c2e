"""The command line as a process of its own: the stages one after the other, and a table of bad inputs."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from zebra_nb.checkpoints import steps_in

SMALL = (
    "--var_mode --base_channels 8 --channel_mult 1,2 --num_res_blocks 1 --hidden_dim 16 --codebook_dim 8 "
    "--vocab_size 16,32,32,32 --scales 1,2,4,8 --batch_size 8 --lr 3e-3 --max_steps 4"
).split()


ZEBRA, CPU = [sys.executable, "-c", "from zebra_nb.cli import main; main()"], {**os.environ, "JAX_PLATFORMS": "cpu"}


def zebra(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    "`zebra-nb` with these arguments, in `cwd`."
    return subprocess.run([*ZEBRA, *map(str, arguments)], cwd=cwd, env=CPU, capture_output=True, text=True)


def succeeds(*arguments: object, cwd: Path) -> str:
    done = zebra(*arguments, cwd=cwd)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


def write_mat(folder: Path, frames: np.ndarray, name: str = "Omega") -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        scipy.io.savemat(folder / f"{i + 1}.mat", {name: frame})
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder in which every stage has run once, at the smallest size: flow.h5, mat/, vqvae/, tokens/, nsp/."
    work = tmp_path_factory.mktemp("work")
    succeeds("simulate", "--output", "flow.h5", "--n_frames", 90, "--num_points", 32, "--spin_up", 5, cwd=work)
    with h5py.File(work / "flow.h5") as f:
        write_mat(work / "mat", f["fields/omega"][:].astype(float))
    succeeds("train-vqvae", "--data_dir", "mat", "--out", "vqvae", *SMALL, cwd=work)
    succeeds("tokenizer", "save", "--checkpoint", "vqvae", "--data-dir", "mat", "--output", "tokens", cwd=work)
    predictor = "--n_layer 1 --n_head 2 --n_embd 16 --optimizer lion --lr 1e-3 --max_steps 4 --batch_size 8".split()
    tokens = ("--tokens_path", "tokens", "--vqvae_checkpoint", "vqvae")
    succeeds("train-nsp", *tokens, "--out", "nsp", *predictor, cwd=work)
    return work


def test_the_stages_follow_one_another(work: Path):
    "A folder of .mat files becomes a tokenizer, tokens, a predictor, and a report."
    assert "8 × 8" in succeeds("tokenizer", "info", "--checkpoint", "vqvae", cwd=work)
    options = "--n_samples 1 --n_steps 3 --temperature 0.9 --top_k 8".split()
    succeeds("eval-nsp", "--nsp_checkpoint", "nsp", "--data_dir", "mat", "--out", "eval", *options, cwd=work)
    metrics = json.loads((work / "eval/metrics.json").read_text())
    assert len(metrics["relative_l2"]["forecast"]) == 3
    assert {p.name for p in (work / "eval").iterdir()} == {"metrics.json", "report.html", "rollout.mp4"}


def test_a_run_goes_on(work: Path):
    "`--resume` continues a run to a later step; without it, the run is not touched."
    before = (work / "vqvae/model.safetensors").read_bytes()
    refused = zebra("train-vqvae", "--data_dir", "mat", "--out", "vqvae", *SMALL, cwd=work)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert (work / "vqvae/model.safetensors").read_bytes() == before
    shutil.copytree(work / "vqvae", work / "longer")
    succeeds("train-vqvae", "--data_dir", "mat", "--out", "longer", *SMALL[:-1], 6, "--resume", cwd=work)
    steps = [json.loads(line)["step"] for line in (work / "longer/history.jsonl").read_text().splitlines()]
    assert steps[-1] == 6 and steps == sorted(set(steps))


def test_a_run_is_asked_to_stop(work: Path):
    "The step is finished and kept; one sentence on standard error says so, and the exit code which signal it was."
    run, options = work / "stopped", [*SMALL[:-1], 100_000, "--validate_every", 10, "--tensorboard"]
    command = [*ZEBRA, "train-vqvae", "--data_dir", "mat", "--out", "stopped", *map(str, options)]
    process, end = (
        subprocess.Popen(command, cwd=work, env=CPU, stderr=subprocess.PIPE, text=True),
        time.monotonic() + 120,
    )
    while not (run / "history.jsonl").exists() or len((run / "history.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 143 and last.startswith("zebra-nb: interrupted by SIGTERM at step "), last
    assert str(steps_in(run / "checkpoints")[-1]) in last and list((run / "tensorboard").iterdir())


def folder_of(kind: str, work: Path) -> Path:
    "A data folder or file that is bad in this way."
    frames = np.random.default_rng(0).normal(size=(60, 32, 32))
    path = work / f"bad {kind}"
    if path.exists() or kind == "missing":
        return path
    if kind == "empty":
        path.mkdir()
    elif kind == "without the variable":
        write_mat(path, frames, name="vorticity")
    elif kind == "few":
        write_mat(path, frames[:2])
    elif kind in ("truncated", "ragged", "nan"):
        write_mat(path, frames)
        if kind == "truncated":
            last = path / "7.mat"
            last.write_bytes(last.read_bytes()[:2000])
        if kind == "ragged":
            scipy.io.savemat(path / "7.mat", {"Omega": np.zeros((16, 32))})
        if kind == "nan":
            scipy.io.savemat(path / "7.mat", {"Omega": np.full((32, 32), np.nan)})
    elif kind == "cut.h5":
        path.write_bytes((work / "flow.h5").read_bytes()[:3000])
    elif kind == "odd size":
        write_mat(path, frames[:, :30, :30])
    elif kind == "constant":
        write_mat(path, np.full_like(frames, 3.0))
    elif kind == "loud":
        write_mat(path, 1e6 * frames)
    return path


DATA = {
    "missing": "bad missing",
    "empty": "bad empty",
    "without the variable": "vorticity",
    "truncated": "7.mat",
    "cut.h5": "bad cut.h5",
    "ragged": "7.mat",
    "nan": "7.mat",
    "odd size": "multiples of 4",
    "few": "frames",
    "constant": "nothing to learn",
}


def refuses(done: subprocess.CompletedProcess, *words: str):
    "Exit code 2, one sentence on standard error that has the words, no traceback, nothing on standard output."
    assert done.returncode == 2, f"exit {done.returncode}: {done.stderr[-2000:]}"
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]  # without progress bars
    assert len(lines) == 1 and lines[0].startswith("zebra-nb: "), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("kind", DATA)
def test_bad_data(kind: str, work: Path):
    "Data that cannot be used: one sentence that names the culprit, and no output folder."
    path = folder_of(kind, work)
    done = zebra("train-vqvae", "--data_dir", path, "--out", f"out {kind}", *SMALL, cwd=work)
    refuses(done, DATA[kind])
    assert not (work / f"out {kind}" / "model.safetensors").exists()
    assert not list(work.glob(f"out {kind}/**/*.part*"))


def test_fields_of_another_unit(work: Path):
    "A tokenizer does not encode what is a million times as strong as what it was trained on."
    loud = folder_of("loud", work)
    done = zebra("tokenizer", "save", "--checkpoint", "vqvae", "--data-dir", loud, "--output", "out loud", cwd=work)
    refuses(done, "units")
    assert not (work / "out loud" / "train.npz").exists()


def test_a_codebook_too_large(work: Path):
    "More codes than latents."
    starved = [*SMALL, "--vocab_size", "9999999"]
    refuses(zebra("train-vqvae", "--data_dir", "mat", "--out", "out large", *starved, cwd=work), "cannot be fed")


def test_training_that_breaks(work: Path):
    "NaN stops the run with the step and the term; the checkpoint from before stays, and can be resumed."
    shutil.copytree(work / "vqvae", work / "broken")
    wild = [*SMALL[:-1], 9, "--lr", "1e30", "--resume"]
    refuses(zebra("train-vqvae", "--data_dir", "mat", "--out", "broken", *wild, cwd=work), "broke at step", "rel_l2")
    assert (work / "broken/model.safetensors").read_bytes() == (work / "vqvae/model.safetensors").read_bytes()
    succeeds("train-vqvae", "--data_dir", "mat", "--out", "broken", *SMALL[:-1], 6, "--resume", cwd=work)


def test_bad_data_for_the_demo(work: Path):
    refuses(zebra("demo", "--data_dir", folder_of("empty", work), "--out", "out demo", cwd=work), "bad empty")
    assert not (work / "out demo").exists()


def test_checkpoint_of_another_architecture(work: Path):
    "A run cannot be resumed with other sizes, and a predictor is not a tokenizer."
    shutil.copytree(work / "vqvae", work / "resumed")
    wider = [*SMALL, "--hidden_dim", "24", "--resume"]
    refuses(zebra("train-vqvae", "--data_dir", "mat", "--out", "resumed", *wider, cwd=work), "another architecture")
    assert (work / "resumed/model.safetensors").read_bytes() == (work / "vqvae/model.safetensors").read_bytes()
    refuses(zebra("tokenizer", "info", "--checkpoint", "nsp/model.safetensors", cwd=work), "NextScalePredictor")
    refuses(zebra("tokenizer", "info", "--checkpoint", "nowhere", cwd=work), "nowhere")


def test_tokens_of_another_tokenizer(work: Path):
    "A predictor is not trained on tokens that another VQ-VAE made, nor on a cut token file."
    other = [*SMALL, "--seed", "1", "--out", "other"]
    succeeds("train-vqvae", "--data_dir", "mat", *other, cwd=work)
    tokens = ("--tokens_path", "tokens", "--max_steps", "2", "--out", "out nsp")
    refuses(zebra("train-nsp", *tokens, "--vqvae_checkpoint", "other", cwd=work), "tokenizer")
    assert not (work / "out nsp").exists()
    shutil.copytree(work / "tokens", work / "cut tokens")
    whole = (work / "tokens/train.npz").read_bytes()
    (work / "cut tokens/train.npz").write_bytes(whole[: len(whole) // 2])
    cut = ("--tokens_path", "cut tokens", "--vqvae_checkpoint", "vqvae", "--out", "out nsp")
    refuses(zebra("train-nsp", *cut, cwd=work), "train.npz")


def test_an_ensemble(work: Path):
    "A preset becomes a folder of shards; the same command completes it, another one is refused."
    small = "--preset decaying-zebra --num_points 16 --n_frames 3 --n_trajectories 4".split()
    succeeds("simulate", "--output", "ensemble", *small, cwd=work)
    shard = work / "ensemble/shard-00000.h5"
    with h5py.File(shard) as f:
        assert f["fields/omega"].shape == (4, 3, 16, 16)
        viscosity = f["parameters/viscosity"][:]
        assert (1e-3 <= viscosity).all() and (viscosity <= 1e-2).all()
    before = shard.stat().st_mtime_ns
    succeeds("simulate", "--output", "ensemble", *small, cwd=work)
    assert shard.stat().st_mtime_ns == before
    refuses(zebra("simulate", "--output", "ensemble", *small, "--seed", 1, cwd=work), "seed is 0 there and 1 here")
    refuses(zebra("simulate", "--output", "out ensemble", "--preset", "weather", cwd=work), "weather", "beta-plane")
    assert not (work / "out ensemble").exists() and shard.stat().st_mtime_ns == before


def test_bad_numbers(work: Path):
    "Sampling that makes no sense, scales that do not fit."
    evaluate = ("eval-nsp", "--nsp_checkpoint", "nsp", "--data_dir", "mat", "--out", "out eval")
    refuses(zebra(*evaluate, "--temperature", "0", cwd=work), "greedy")
    refuses(zebra(*evaluate, "--top_p", "1.5", cwd=work), "top_p")
    assert not (work / "out eval").exists()
    scales = [*SMALL, "--scales", "1,2,4,16"]
    refuses(zebra("train-vqvae", "--data_dir", "mat", "--out", "out scales", *scales, cwd=work), "scales")
    assert zebra("train-vqvae", "--data_dir", "mat", "--scales", "1;2", cwd=work).returncode == 2


WATCHED = """
import sys
sys.modules.update(dict.fromkeys(("IPython", "ipywidgets", "matplotlib")))  # as if they were not installed
from zebra_nb.model_files import load, read_header
from zebra_nb.monitor import TrainingMonitor
from zebra_nb.pipeline import split_like, train_nsp, train_vqvae
from zebra_nb.training import TrainConfig

record, config = read_header("vqvae/model.safetensors")["record"], load("vqvae/model.safetensors").config
data = split_like(record, "mat")
monitor, other = TrainingMonitor(data.test.snapshots()[0][None]), TrainingMonitor()
train_vqvae(data, config, TrainConfig.from_dict(record["training"]), out="watched vqvae", watch=monitor)
how, size = TrainConfig(max_steps=4, batch_size=8, lr=1e-3, optimizer="lion"), dict(n_layer=1, n_head=2, n_embd=16)
train_nsp("tokens", "vqvae", how, out="watched nsp", watch=other, **size)
assert monitor.pace.drawings == other.pace.drawings == []
assert 0 < monitor.figure_data()["error"][0] < 2 and len(other.figure_data()["bits"]["bits"][0]) == 2
print("both were watched")
"""


def in_terminal(code: str, cwd: Path) -> str:
    "What a terminal gets from Python that runs `code` in it."
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    env, streams = CPU, dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process, seen = subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=env, **streams), []
    os.close(theirs)
    try:
        while part := os.read(ours, 4096):
            seen.append(part)
    except OSError:  # how Linux tells that nobody holds the other end any more
        pass
    os.close(ours)
    text = b"".join(seen).decode()
    assert process.wait() == 0, text[-3000:]
    return text


def test_a_watched_run_in_a_terminal(work: Path):
    "With a monitor as without: a bar with rate and time left, and no picture."
    text = in_terminal(WATCHED, work)
    for stage in ("tokenizer", "predictor"):
        bar = rf"\rtraining {stage}: 100%\|.+\| 4/4 \[\d\d:\d\d<00:00, +[\d.]+(it/s|s/it), "
        assert re.search(bar, text), text
    assert "both were watched" in text and "\x1b" not in text and "Figure" not in text
    assert (work / "watched vqvae/model.safetensors").exists() and (work / "watched nsp/tokenizer").is_dir()
