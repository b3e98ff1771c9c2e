"""Files of every version are read as they were written, damaged and newer ones are refused, and nothing is ever unpickled."""

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

root = Path(__file__).resolve().parents[1]
fixtures = root / "tests/fixtures"
sys.path.insert(0, str(fixtures))

import make  # noqa: E402
from test_fuzz import LAYOUTS  # noqa: E402

from zebra_nb import checkpoints, hub, model_files, token_files  # noqa: E402
from zebra_nb.checkpoints import checkpointed  # noqa: E402
from zebra_nb.core import InputError  # noqa: E402
from zebra_nb.data import open_fields  # noqa: E402
from zebra_nb.model_files import content_hash, load, read_header  # noqa: E402
from zebra_nb.nsp import NextScalePredictor  # noqa: E402
from zebra_nb.token_files import TokenDataset  # noqa: E402
from zebra_nb.tokenizer import VQVAETokenizer  # noqa: E402

EXPECTED = json.loads((fixtures / "expected.json").read_text())
VERSIONS = {
    "model": model_files.FORMAT_VERSION, "tokens": token_files.TOKEN_VERSION, "shards": token_files.TOKEN_VERSION,
    "tokenizer": hub.PRETRAINED_VERSION, "predictor": hub.PRETRAINED_VERSION, "run": checkpoints.CHECKPOINT_VERSION,
}  # fmt: skip
OPEN = {
    "model": load, "tokens": TokenDataset, "shards": lambda path: TokenDataset(path / "train.npz"),
    "tokenizer": VQVAETokenizer.from_pretrained, "predictor": NextScalePredictor.from_pretrained, "run": checkpointed,
}  # fmt: skip


def kind(name: str) -> str:
    return name.partition("-v")[0]


def copied(name: str, tmp_path: Path) -> Path:
    "A copy of a fixture."
    copy = shutil.copytree if (fixtures / name).is_dir() else shutil.copy
    return Path(copy(fixtures / name, tmp_path / name))


def told(name: str, path: Path) -> str:
    "The sentence by which a file is refused."
    with pytest.raises(InputError) as caught:
        OPEN[kind(name)](path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_kind_has_a_fixture():
    "Each kind has one of each version so far, all of them a few kilobytes."
    for name, newest in VERSIONS.items():
        first = 2 if name in ("shards", "run") else 1
        for version in range(first, newest + 1):
            assert [f for f in EXPECTED if f.split(".")[0] == f"{name}-v{version}"], f"no {name} of version {version}"
    files = [path for path in fixtures.rglob("*") if path.is_file()]
    assert {path.relative_to(fixtures).parts[0] for path in files} - {"__pycache__"} == {
        *EXPECTED,
        "make.py",
        "expected.json",
    }
    assert max(path.stat().st_size for path in files) < 80_000


@pytest.mark.parametrize("name", EXPECTED)
def test_fixture_gives_its_numbers(name: str):
    "What was saved by any version comes out, to the hash and the last code."
    path, wanted = fixtures / name, EXPECTED[name]
    with tempfile.TemporaryDirectory() as folder:  # who opens the checkpoints of a run writes there, too
        found = OPEN[kind(name)](copied(name, Path(folder)) if kind(name) == "run" else path)
    if kind(name) == "run":
        assert make.seen(found)["hash"] == wanted["hash"]
        got = found.decode([np.array(c) for c in wanted["codes"]])
    elif kind(name) == "model":
        got = found.decode([np.array(c) for c in wanted["codes"]])
        assert content_hash(found) == wanted["hash"] == read_header(fixtures / name)["hash"]
        assert read_header(fixtures / name)["record"] == {"steps": 0}
    elif kind(name) == "tokenizer":
        got = found.decode(np.array(wanted["row"]))
        assert found.hash == wanted["hash"]
    elif kind(name) == "predictor":
        rows = np.array(EXPECTED["tokens-v1.npz"]["rows"])[:3]
        got = found(rows[:2], rows[2])
        assert content_hash(found) == wanted["hash"]
        np.testing.assert_allclose([make.checksum(x) for x in got], wanted["logits"], rtol=1e-5, atol=1e-5)
        return
    else:
        its = VQVAETokenizer.from_pretrained(fixtures / "tokenizer-v1")
        found.check(its)
        got = its.decode(found.indices_flat)
        assert found.indices_flat.tolist() == wanted["rows"] and found.trajectory.tolist() == [0] * 5 + [1] * 5
        assert found.time.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0] * 2 and len(found.windows(2)) == 8
        assert (found.tokenizer_hash, found.hash) == (wanted["tokenizer"], EXPECTED["tokens-v2.npz"]["hash"])
    np.testing.assert_allclose(make.checksum(got), wanted["decoded"], rtol=1e-5, atol=1e-5)


def repacked(path: Path, **changes):
    "Writes an archive again, with other arrays."
    with np.load(path) as f:
        arrays = dict(f)
    np.savez_compressed(path, **arrays | changes)


def raise_version(path: Path, version: int):
    "Makes a file say that it is of another version."
    if path.suffix == ".npz":
        repacked(path, format_version=version)
    elif path.suffix == ".safetensors":
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        with safe_open(path, "np") as f:
            metadata = f.metadata()
        save_file(load_file(path), path, metadata=metadata | {"version": str(version)})
    elif path.suffix == ".eqx":
        line, arrays = path.read_bytes().split(b"\n", 1)
        path.write_bytes(json.dumps(json.loads(line) | {"version": version}).encode() + b"\n" + arrays)
    elif (path / "run.json").exists():
        about = next(path.glob("checkpoints/*/about/metadata"))
        about.write_text(json.dumps(json.loads(about.read_text()) | {"version": version}))
    else:
        about = next(p for p in (path / "config.json", path / "train.json") if p.exists())
        about.write_text(json.dumps(json.loads(about.read_text()) | {"version": version}))


@pytest.mark.parametrize("name", EXPECTED)
def test_newer_version_is_refused(name: str, tmp_path: Path):
    "The sentence names the file's version and the newest that is read."
    newest, path = VERSIONS[kind(name)], copied(name, tmp_path)
    raise_version(path, newest + 1)
    assert f"format version {newest + 1}, this zebra_nb reads up to {newest}: " in told(name, path)


@pytest.mark.parametrize("name", EXPECTED)
def test_flipped_bit_is_noticed(name: str, tmp_path: Path):
    "In the arrays of a model by its hash; in the rows of a token file by the archive's checksum, or by the hash; in what a checkpoint says by its seal (its arrays: see `test_faults`)."
    path = copied(name, tmp_path)
    file = {"tokenizer": path / "model.safetensors", "predictor": path / "model.safetensors"}.get(kind(name), path)
    if kind(name) == "shards":
        file = path / "train-00001-of-00002.npz"
    elif kind(name) == "run":
        about = next(path.glob("checkpoints/*/about/metadata"))
        about.write_text(about.read_text().replace('"fold_in": 2', '"fold_in": 3'))
        assert "is damaged" in told(name, path)
        return
    data = bytearray(file.read_bytes())
    if file.suffix == ".npz":
        with zipfile.ZipFile(file) as z:
            middle = z.getinfo("codebook.npy").header_offset + 100
        data[middle] ^= 1
        file.write_bytes(data)
        assert "is not a whole token file" in told(name, path)
        shutil.copy(fixtures / name / file.name if path.is_dir() else fixtures / name, file)
        with np.load(file) as f:
            rows = f["indices_flat"].copy()
        rows[2, -1] ^= 1
        repacked(file, indices_flat=rows)
        if name.endswith("v1.npz"):  # has no hash: read, but it has another identity
            assert TokenDataset(file).hash != EXPECTED["tokens-v2.npz"]["hash"]
        else:
            assert "damaged or altered" in told(name, path)
    else:
        data[-1] ^= 1
        file.write_bytes(data)
        assert "is not as it was saved, but damaged or altered" in told(name, path)


def test_shard_of_another_run_is_noticed(tmp_path: Path):
    "What an earlier run left of the same tokenizer and as many rows is refused, be it of other data or of an earlier release."
    its, path = VQVAETokenizer.from_pretrained(fixtures / "tokenizer-v1"), tmp_path / "train.npz"
    data, other = (open_fields(sign * make.fields(), dt=0.5, axes="nthw") for sign in (1, -1))
    for process in (0, 1):
        its.save_tokens(path, data, process=process, n_processes=2, bar=False)
    whole, shard = TokenDataset(path).hash, tmp_path / "train-00001-of-00002.npz"
    with np.load(fixtures / "shards-v2" / shard.name) as f:
        assert str(f["tokenizer_hash"]) == its.hash and "data_hash" not in f
    its.save_tokens(path, other, process=1, n_processes=2, bar=False)
    for left in (shard.read_bytes(), (fixtures / "shards-v2" / shard.name).read_bytes()):
        shard.write_bytes(left)
        assert "does not belong to 'train.json', but to another tokenizer or other data" in told("shards-v2", tmp_path)
    its.save_tokens(path, data, process=1, n_processes=2, bar=False)
    assert TokenDataset(path).hash == whole


def test_lying_sizes_cost_nothing(tmp_path: Path):
    "Files that claim terabytes are refused before anything of that size is asked for."
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, dict(descr="<f4", fortran_order=False, shape=(10**6, 10**6)))
    line = (fixtures / "model-v1.eqx").read_bytes().split(b"\n", 1)[0]
    (tmp_path / "model-v1.eqx").write_bytes(line + b"\n" + claim.getvalue())
    whole = (fixtures / "model-v1.safetensors").read_bytes()
    (tmp_path / "model-v1.safetensors").write_bytes((2**40).to_bytes(8, "little") + whole[8:])
    shutil.copy(fixtures / "tokens-v2.npz", tmp_path / "tokens-v2.npz")
    repacked(tmp_path / "tokens-v2.npz", indices_flat=np.zeros((10**7, 21), np.int32))
    assert (tmp_path / "tokens-v2.npz").stat().st_size < 2e6
    tracemalloc.start()
    sentences = [told(path.name, path) for path in sorted(tmp_path.iterdir())]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6, peak
    assert all(
        s in t for s, t in zip(("claims to be float32", "a header of 1,099,511", "claim to unpack to 840,"), sentences)
    )


KILLED = """
import os, signal, sys, numpy as np
sys.path.insert(0, sys.argv[1])
import make
def half(path, **arrays):
    open(path, "wb").write(b"PK half a file")
    os.kill(os.getpid(), signal.SIGKILL)
np.savez_compressed = half
its = make.VQVAETokenizer.from_pretrained(sys.argv[1] + "/tokenizer-v1")
its.save_tokens(sys.argv[2], make.open_fields(make.fields(), dt=0.5, axes="nthw"), bar=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_save_leaves_the_older_file(tmp_path: Path):
    "What it began lies beside the older file, which is whole, and the next save takes it away."
    path = copied("tokens-v2.npz", tmp_path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, str(fixtures), str(path)], capture_output=True, text=True)
    assert done.returncode < 0, done.stderr[-2000:]
    assert len(list(tmp_path.iterdir())) == 2 and path.read_bytes() == before
    its, data = (
        VQVAETokenizer.from_pretrained(fixtures / "tokenizer-v1"),
        open_fields(make.fields(), dt=0.5, axes="nthw"),
    )
    its.save_tokens(path, data, bar=False)
    assert list(tmp_path.iterdir()) == [path]
    assert TokenDataset(path).hash == TokenDataset(its.save_tokens(tmp_path / "undisturbed.npz", data, bar=False)).hash


PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
modules = sorted((root / "zebra_nb").glob("*.py"))


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)
def test_no_module_runs_what_it_reads(path: Path):
    "No unpickler is imported, no text is made code, and NumPy is nowhere allowed to unpickle."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    assert not {name.split(".")[0] for name in names} & PICKLERS
    assert not [
        c.lineno for c in calls(tree) if isinstance(c.func, ast.Name) and c.func.id in ("eval", "exec", "compile")
    ]
    allowed = [kw.value for c in calls(tree) for kw in c.keywords if kw.arg == "allow_pickle"]
    assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed)


NO_PICKLE = """
import _pickle, json, pickle, sys, warnings
from pathlib import Path
import h5netcdf, numpy as np, scipy.io, xarray, zarr
fixtures, layouts, trap = map(Path, sys.argv[1:])
sys.path[:0] = [str(fixtures), str(fixtures.parent)]
import test_formats as t
from zebra_nb.core import InputError

class Unpickled(BaseException): pass
def refuse(*args, **kw): raise Unpickled
for module in (pickle, _pickle):
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        if hasattr(module, name): setattr(module, name, refuse)
try:
    np.load(trap, allow_pickle=True)
except Unpickled:
    print("armed")
for name in t.EXPECTED:
    t.test_fixture_gives_its_numbers(name)
    print(name)
for path in sorted(layouts.iterdir()):
    ds = t.open_fields(path)
    assert np.isfinite(ds.frames(0)).all()
    print(path.name)
for call in (lambda: t.open_fields(trap).frames(0), lambda: t.open_fields(trap.with_suffix(".npz")).frames(0)):
    try:
        call()
    except InputError as e:
        print("refused")
"""


class Trap:
    "Leaves a mark where it is unpickled."

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nothing_is_unpickled(tmp_path: Path):
    "Every fixture and every layout is read by an interpreter whose unpicklers are traps."
    (tmp_path / "layouts").mkdir()
    for name, write in LAYOUTS.items():
        write(tmp_path / "layouts" / name)
    trap = np.array([Trap(tmp_path / "it ran")] * 2, dtype=object)
    np.save(tmp_path / "trap.npy", trap)
    np.savez_compressed(tmp_path / "trap.npz", u=trap)
    command = [sys.executable, "-c", NO_PICKLE, fixtures, tmp_path / "layouts", tmp_path / "trap.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["armed", *EXPECTED, *sorted(LAYOUTS), "refused", "refused"]
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("place", ["filter", "second filter", "compressor", "clock"])
def test_zarr_does_not_unpickle(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "Version 2 of Zarr knows a codec that unpickles: the reader refuses it, even where numcodecs would allow it."
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    text, unsafe = {"id": "vlen-utf8"}, {"id": "pickle", "protocol": 5}
    filters, compressor = {"filter": ([unsafe], None), "compressor": ([text], unsafe)}.get(
        place, ([text, unsafe], None)
    )
    about = dict(zarr_format=2, order="C", dimension_separator=".", compressor=None, filters=None)
    shape = dict(shape=[4] if place == "clock" else [4, 8, 8], chunks=[4] if place == "clock" else [4, 8, 8])
    bad = tmp_path / "store.zarr" / ("time" if place == "clock" else "u")
    bad.mkdir(parents=True)
    (bad.parent / ".zgroup").write_text('{"zarr_format": 2}')
    (bad / ".zarray").write_text(
        json.dumps(about | shape | dict(dtype="|O", fill_value="", filters=filters, compressor=compressor))
    )
    (bad / ("0" if place == "clock" else "0.0.0")).write_bytes(pickle.dumps(Trap(tmp_path / "it ran")))
    if place == "clock":
        (bad.parent / "u").mkdir()
        good = about | dict(shape=[4, 8, 8], chunks=[4, 8, 8], dtype="<f4", fill_value=1.0)
        (bad.parent / "u/.zarray").write_text(json.dumps(good))
    with pytest.raises(InputError):
        open_fields(bad.parent).frames(0)
    assert not (tmp_path / "it ran").exists()
