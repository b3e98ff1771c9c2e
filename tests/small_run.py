"""The run that the tests of survival train: a VQ-VAE as small as it can be, with all that a run can have."""

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from zebra_nb.checkpoints import Checkpoints
from zebra_nb.core import InputError
from zebra_nb.loading import Loader
from zebra_nb.model_files import content_hash, load
from zebra_nb.quantizer import QuantizerConfig
from zebra_nb.sessions import Interrupted
from zebra_nb.training import TrainConfig, fit
from zebra_nb.vqvae import VARVQVAE2d, VQVAEConfig, vqvae_loss

CONFIG = TrainConfig(
    max_steps=60, batch_size=4, average=0.9, log_every=1, validate_every=6, checkpoint_every=3, lr=3e-3
)
PRELOAD = ["small_run", "zebra_nb.training", "zebra_nb.vqvae", "orbax.checkpoint", "grain"]
TIMING = ("seconds", "_per_second")  # what may differ in the history of two equal runs


def smooth_fields(n: int, size: int = 16) -> np.ndarray:
    "Random waves of low wave numbers, `(n, 1, size, size)`."
    noise = np.fft.rfft2(np.random.default_rng(0).normal(size=(n, 1, size, size)))
    k = np.hypot(np.fft.fftfreq(size, 1 / size)[:, None], np.fft.rfftfreq(size, 1 / size))
    fields = np.fft.irfft2(noise * np.exp(-((k / 3) ** 2)))
    return (fields / fields.std()).astype(np.float32)


def untrained() -> VARVQVAE2d:
    "The model before the first step."
    quantizer = QuantizerConfig(dim=4, vocab_size=16, scales=(1, 2, 4, 8), shared=True)
    small = dict(field_size=(16, 16), base_channels=4, channel_mult=(1,), num_res_blocks=0, hidden_dim=8)
    config = VQVAEConfig(**small, quantizer=quantizer)
    return eqx.filter_jit(lambda key: VARVQVAE2d(config, key=key))(jax.random.key(0))  # one program instead of dozens


def train(out: Path | None, *, resume: bool = False, cache: Path | None = None, options: dict | None = None, **more):
    "Trains the small model in `out`; `options` of the configuration, `more` for `fit`."
    if cache is not None:  # of compiled programs
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config, fields = dataclasses.replace(CONFIG, **(options or {})), smooth_fields(40)
    batches = Loader(fields[:32], config.batch_size)
    return fit(untrained(), vqvae_loss, batches, valid=[fields[32:]], config=config, out=out, resume=resume, **more)


def slowly(seconds: float, history, model):
    "A `watch` that gives others time to interfere."
    time.sleep(seconds)


def measuring(path: Path, history, model):
    "A `watch` that writes down what this process holds of the machine, in the middle of every 100 steps."
    if history[-1]["step"] % 100 == 50:  # when no checkpoint is being written
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        now = {"megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "threads": len(os.listdir("/proc/self/task"))}
        with open(path, "a") as file:
            now["files"] = len(os.listdir("/proc/self/fd"))
            file.write(json.dumps({"step": history[-1]["step"], **now}) + "\n")


def program(told: Connection, *arguments, pause: float = 0, measure: Path | None = None, **options):
    "A child's main function: `train`, with the exit code of a command; the parent is told its last sentence."
    watch = functools.partial(measuring, measure) if measure else functools.partial(slowly, pause) if pause else None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress bars
    try:
        train(*arguments, watch=watch, **options)
        code, words = 0, "finished"
    except Interrupted as e:
        code, words = 128 + e.signal, str(e)
    except InputError as e:
        code, words = 2, str(e)
    told.send(words)
    raise SystemExit(code)


class Child:
    "A process that trains in `out`; it starts quickly, because it is forked from one that has imported everything."

    def __init__(self, out: Path, **options):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.out, (self.pipe, there) = out, context.Pipe(duplex=False)
        self.process = context.Process(target=program, args=(there, out), kwargs=options)
        self.process.start()
        there.close()

    def end(self, within: float = 60) -> tuple[int, str]:
        "Waits for the end: exit code and last sentence, empty where there was no time to say one."
        self.process.join(within)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the run in '{self.out}' did not end")
        try:
            return self.process.exitcode, self.pipe.recv()
        except EOFError:
            return self.process.exitcode, ""

    def wait_until(self, condition: Callable[[], bool], within: float = 60):
        "Returns when the condition holds; nobody else's process may have ended before."
        end = time.monotonic() + within
        while not condition():
            assert self.process.exitcode is None, f"the run ended too early: {self.end()}"
            assert time.monotonic() < end, f"the run in '{self.out}' does not come to it"
            time.sleep(0.001)


def rows(out: Path) -> list[dict]:
    "The whole lines of the history, without what depends on the clock."
    path = out / "history.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMING)} for line in lines]


def last_step(out: Path) -> int:
    return max((r["step"] for r in rows(out)), default=0)


def sessions(out: Path) -> list[dict]:
    return json.loads((out / "run.json").read_text())["sessions"]


def kept_arrays(out: Path) -> dict[int, dict[str, bytes]]:
    "The bytes of all arrays of all checkpoints, by step and name."
    import orbax.checkpoint as ocp

    checkpoints, wanted = Checkpoints(out / "checkpoints"), ocp.args.Composite(state=ocp.args.StandardRestore())
    found = {step: checkpoints.manager.restore(step, args=wanted).state for step in checkpoints.steps}
    checkpoints.close()
    return {step: {k: np.asarray(v).tobytes() for k, v in arrays.items()} for step, arrays in found.items()}


def same_end(a: Path, b: Path) -> bool:
    "Whether two runs ended equally, to the bit: model, checkpoints, history; and no file of either is half written."
    assert content_hash(load(a / "model.safetensors")) == content_hash(load(b / "model.safetensors"))
    assert rows(a) == rows(b)
    assert kept_arrays(a) == kept_arrays(b)
    for out in (a, b):
        assert {p.name for p in out.iterdir()} == {
            "model.safetensors",
            "history.jsonl",
            "run.json",
            ".lock",
            "checkpoints",
        }
        assert all(p.name.isdecimal() for p in (out / "checkpoints").iterdir())
    return True
