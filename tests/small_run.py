"""The run that the tests of survival train: a VQ-VAE as small as it can be, with all that a run can have."""

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from zebra_nb.checkpoints import Checkpoints, architecture
from zebra_nb.core import InputError, content_hash, load, named_leaves
from zebra_nb.loading import Loader
from zebra_nb.quantizer import QuantizerConfig
from zebra_nb.sessions import Interrupted
from zebra_nb.training import TrainConfig, TrainState, fit
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
    quantizer = QuantizerConfig(dim=4, vocab_size=16, scales=(1, 2, 4, 8))
    small = dict(field_size=(16, 16), base_channels=4, channel_mult=(1,), num_res_blocks=0, hidden_dim=8)
    return VARVQVAE2d(VQVAEConfig(**small, quantizer=quantizer), key=jax.random.key(0))


def train(out: Path | None, *, resume: bool = False, cache: Path | None = None, options: dict | None = None, **more):
    "Trains the small model in `out`; `options` of the configuration, `more` for `fit`."
    if cache is not None:  # of compiled programs
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config, fields = dataclasses.replace(CONFIG, **(options or {})), smooth_fields(40)
    batches = Loader(fields[:32], config.batch_size)
    return fit(
        untrained(), vqvae_loss, batches, valid=[fields[32:]], config=config, out=out, resume=resume, **more
    )


def program(told: Connection, silent: bool, *arguments, **options):
    "A child's main function: `train`, with an exit code as a command's, and the last sentence told to the parent."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if silent:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(*arguments, **options)
        code, words = 0, "finished"
    except Interrupted as e:
        code, words = 128 + e.signal, str(e)
    except InputError as e:
        code, words = 2, str(e)
    told.send(words)
    raise SystemExit(code)
