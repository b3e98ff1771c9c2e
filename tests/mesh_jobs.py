"""What the processes of `test_mesh` do; each function is the whole work of a process."""

import json
from pathlib import Path


def fields(folder: str) -> None:
    "Simulates a short flow."
    import jax

    from zebra_nb.simulate import ForcedTurbulence, simulate

    path = Path(folder) / "flow.h5"
    simulate(ForcedTurbulence(num_points=16), 160, key=jax.random.key(0), spin_up=20, path=path, progress=False)


def configs():
    "The smallest VQ-VAE with everything in it, and how it is trained."
    from zebra_nb.quantizer import QuantizerConfig
    from zebra_nb.training import TrainConfig
    from zebra_nb.vqvae import VQVAEConfig

    quantizer = QuantizerConfig(dim=4, vocab_size=(8, 16), scales=(2, 8))
    size = dict(base_channels=16, channel_mult=(1,), num_res_blocks=1, hidden_dim=32)
    config = VQVAEConfig(field_size=(16, 16), quantizer=quantizer, **size)
    # Adam turns a gradient of rounding errors into steps as long as any other: the attention's key bias has no other
    # gradient (a softmax does not see it), and the learning rate is small so that the rest stays within 1e-5.
    return config, TrainConfig(
        max_steps=12, batch_size=16, lr=1e-4, warmup_steps=2, validate_every=6, checkpoint_every=6, log_every=4
    )


def train(data: str, out: str, mesh: str) -> None:
    "Trains a VQ-VAE on `mesh`; goes on with what is in `out`."
    import os

    from zebra_nb.mesh import join, make_mesh

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        join()
    from zebra_nb import pipeline

    splits, (config, how) = pipeline.split_fields(Path(data) / "flow.h5"), configs()
    pipeline.train_vqvae(splits, config, how, out=Path(out) / "vqvae", resume=True, mesh=make_mesh(mesh))


def save_steps(out: Path, name: str, start, loss, how, mesh: str, batches) -> int:
    "Some training steps on a mesh: writes the arrays of the state, returns the bytes of a step's arguments per device."
    import numpy as np

    from zebra_nb.mesh import cut, make_mesh, place, place_rows
    from zebra_nb.model_files import named_leaves
    from zebra_nb.training import make_step

    mesh = make_mesh(mesh)
    state, batches = place(start, cut(start, mesh)), [place_rows(batch, mesh) for batch in batches]
    step = make_step(loss, how, mesh).lower(state, batches[0]).compile()
    for batch in batches:
        state, _ = step(batch, state)
    np.savez(out / f"{name}.npz", **{k: np.asarray(v) for k, v in named_leaves(state).items()})
    return step.compiled.memory_analysis().argument_size_in_bytes


def steps(out: str) -> None:
    "Some training steps of a VQ-VAE and of a predictor, on one device and on meshes of eight."
    import jax
    import numpy as np

    from zebra_nb.core import create
    from zebra_nb.nsp import NextScalePredictor, nsp_loss
    from zebra_nb.token_embedding import NSPConfig
    from zebra_nb.training import TrainState
    from zebra_nb.vqvae import VARVQVAE2d, vqvae_loss

    (config, how), rng, held = configs(), np.random.default_rng(0), {}
    waves = rng.normal(size=(3, 16, 1, 16, 16)).astype(np.float32).cumsum(-1).cumsum(-2)
    model = create(VARVQVAE2d, config, key=jax.random.key(0)).start(waves[0], key=jax.random.key(1))
    for mesh in ("data=1", "data=8", "data=4,model=2"):
        args = TrainState.create(model, how), vqvae_loss, how, mesh, waves
        held[f"vqvae {mesh}"] = save_steps(Path(out), f"vqvae {mesh}", *args)
    size = NSPConfig(scales=(1, 4), scale_vocab_sizes=(8, 16), codebook_dim=4, n_layer=1, n_head=2, n_embd=64)
    tokens = np.concatenate([rng.integers(0, 8, (3, 16, 3, 1)), rng.integers(8, 24, (3, 16, 3, 16))], axis=-1)
    model = create(NextScalePredictor, size, rng.normal(size=(24, 4)).astype(np.float32), key=jax.random.key(0))
    for mesh in ("data=1", "data=2,model=4"):
        args = TrainState.create(model, how), nsp_loss, how, mesh, tokens.astype(np.int32)
        held[f"nsp {mesh}"] = save_steps(Path(out), f"nsp {mesh}", *args)
    (Path(out) / "memory.json").write_text(json.dumps(held))


def tokens(data: str, out: str) -> None:
    "Tries to train into a folder that holds a run, then tokenizes with its model."
    import os

    from zebra_nb.core import InputError
    from zebra_nb.mesh import join

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        join()
    import jax

    from zebra_nb import pipeline
    from zebra_nb.core import create
    from zebra_nb.sessions import Session
    from zebra_nb.vqvae import VARVQVAE2d

    config, how = configs()
    try:
        with Session(Path(data) / "vqvae", create(VARVQVAE2d, config, key=jax.random.key(0)), how):
            raise AssertionError("not refused")
    except InputError as e:
        print(e)
    pipeline.save_tokens(pipeline.split_fields(Path(data) / "flow.h5"), Path(data) / "vqvae", out=Path(out))
