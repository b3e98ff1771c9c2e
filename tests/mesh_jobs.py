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


def chain(data: str, out: str, mesh: str, last: str = "rollout") -> None:
    "Fields to tokenizer to tokens to predictor to rollout, or up to the `last` stage, on `mesh`; goes on with what is in `out`."
    import os

    from zebra_nb.mesh import everywhere, join, make_mesh

    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        join()
    import dataclasses

    import jax
    import numpy as np

    from zebra_nb import pipeline
    from zebra_nb.tokenizer import TokenDataset

    devices, out = make_mesh(mesh), Path(out)
    here = make_mesh(f"data={len(jax.local_devices())}", local=True)
    splits, (config, how) = pipeline.split_fields(Path(data) / "flow.h5"), configs()
    pipeline.train_vqvae(splits, config, how, out=out / "vqvae", resume=True, mesh=devices)
    pipeline.save_tokens(splits, out / "vqvae", out=out / "tokens", mesh=here)
    if last == "tokens":
        return
    size = dict(n_layer=1, n_head=2, n_embd=32)
    how = dataclasses.replace(how, max_steps=4)
    predictor, _ = pipeline.train_nsp(
        out / "tokens", out / "vqvae", how, out=out / "nsp", resume=True, mesh=devices, **size
    )
    rows = TokenDataset(out / "tokens/test.npz").windows(2)[:4]
    tokens = everywhere(predictor, devices).rollout(rows, 3, key=jax.random.key(0), n_ensemble=2)
    np.save(out / "rollout.npy", tokens)


def steps(out: str) -> None:
    "Some training steps on one device and on meshes of eight: the arrays of the states, and the bytes of a step's arguments per device."
    import jax
    import numpy as np

    from zebra_nb.core import create, named_leaves
    from zebra_nb.mesh import cut, make_mesh, place, place_rows
    from zebra_nb.training import TrainState, make_step
    from zebra_nb.vqvae import VARVQVAE2d, vqvae_loss

    (config, how), held = configs(), {}
    model = create(VARVQVAE2d, config, key=jax.random.key(0))
    waves = np.random.default_rng(0).normal(size=(3, 16, 1, 16, 16)).astype(np.float32).cumsum(-1).cumsum(-2)
    start = TrainState.create(model.start(waves[0], key=jax.random.key(1)), how)
    for name in ("data=1", "data=8", "data=4,model=2", "data=2,model=4", "model=8"):
        mesh = make_mesh(name)
        state, step = place(start, cut(start, mesh)), make_step(vqvae_loss, how, mesh)
        batches = [place_rows(fields, mesh) for fields in waves]
        held[name] = step.lower(state, batches[0]).compile().compiled.memory_analysis().argument_size_in_bytes
        for batch in batches:
            state, _ = step(state, batch)
        np.savez(Path(out) / f"{name}.npz", **{k: np.asarray(v) for k, v in named_leaves(state).items()})
    (Path(out) / "memory.json").write_text(json.dumps(held))


def refused(run: str) -> None:
    "Tries to train into a folder that holds a run."
    from zebra_nb.core import InputError
    from zebra_nb.mesh import join

    join()
    import jax

    from zebra_nb.core import create
    from zebra_nb.sessions import Session
    from zebra_nb.vqvae import VARVQVAE2d

    config, how = configs()
    try:
        with Session(run, create(VARVQVAE2d, config, key=jax.random.key(0)), how):
            raise AssertionError("not refused")
    except InputError as e:
        print(e)
