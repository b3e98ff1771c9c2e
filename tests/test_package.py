"""The package as its users get it: a wheel in an environment of its own, quick to import, no pickle."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

root = Path(__file__).resolve().parents[1]
modules = sorted(path for path in (root / "zebra_nb").glob("*.py") if not path.name.startswith("_"))


def run(*command: object, cwd: Path) -> str:
    "The standard output of the command, which must succeed, run outside the checkout."
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The `bin` folder of an empty environment into which the built wheel, and nothing else, was installed."
    tmp = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "build", "--outdir", tmp / "dist", root, cwd=tmp)  # an sdist, and the wheel from it
    (wheel,) = (tmp / "dist").glob("*.whl")
    run(sys.executable, "-m", "venv", tmp / "venv", cwd=tmp)
    scripts = tmp / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp)
    return scripts


def test_wheel_is_whole(scripts: Path, tmp_path: Path):
    "The installed package holds every module of the checkout, under the version of the checkout."
    code = "import zebra_nb, pathlib; print(pathlib.Path(zebra_nb.__file__).parent, zebra_nb.__version__)"
    folder, version = run(scripts / "python", "-c", code, cwd=tmp_path).split()
    assert not Path(folder).is_relative_to(root)
    assert {path.name for path in modules} <= {path.name for path in Path(folder).glob("*.py")}
    assert f'__version__ = "{version}"' in (root / "zebra_nb/__init__.py").read_text()
    assert f"version = {version}\n" in (root / "settings.ini").read_text()


def test_wheel_brings_no_notebook_tools(scripts: Path, tmp_path: Path):
    "Neither nbdev nor Jupyter nor what only developers or extras need comes along."
    listing = json.loads(run(scripts / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path))
    names = {item["name"].lower().replace("_", "-") for item in listing}
    assert {"zebra-nb", "jax", "equinox"} <= names
    tools = "nbdev execnb ipython ipykernel jupyter-core jupyterlab notebook ipywidgets pytest beartype"
    extras = "wandb huggingface-hub"
    assert not names & {*tools.split(), *extras.split()}


def test_wheel_brings_pretrained_models(scripts: Path, tmp_path: Path):
    "They load by name, without network or extras, and work; a name on the hub asks for the extra."
    code = """
import jax, numpy as np
from zebra_nb.core import InputError
from zebra_nb.nsp import NextScalePredictor
from zebra_nb.tokenizer import VQVAETokenizer
tokenizer = VQVAETokenizer.from_pretrained("turbulence-64")
predictor = NextScalePredictor.from_pretrained("turbulence-64")
x = np.sin(4 * np.linspace(0, 2 * np.pi, 64, endpoint=False))
tokens = tokenizer.encode(8 * x[:, None] * x)
assert tokens.shape == (341,) and tokenizer.bits_per_frame <= 9 * 341
assert predictor.generate(np.stack([tokens, tokens]), key=jax.random.key(0)).shape == (341,)
try:
    VQVAETokenizer.from_pretrained("user/name")
except InputError as e:
    print(e)
"""
    assert "hub" in run(scripts / "python", "-c", code, cwd=tmp_path)
    sizes = [path.stat().st_size for path in (root / "zebra_nb/pretrained").rglob("tokenizer/*.safetensors")]
    assert sizes and max(sizes) < 8e6


def test_wheel_brings_the_tutorials(scripts: Path, tmp_path: Path):
    "They are copied to where the lab starts; what is there already is left alone; without JupyterLab it says what to install."
    (tmp_path / "here").mkdir()
    first = min(path.name for path in (root / "nbs/tutorials").glob("*.ipynb"))
    (tmp_path / "here" / first).write_text("mine")
    code = "from pathlib import Path; from zebra_nb.lab import tutorials; print(tutorials(Path('here')))"
    assert run(scripts / "python", "-c", code, cwd=tmp_path).strip() == "here"
    copies = {path.name: path.read_text() for path in (tmp_path / "here").iterdir()}
    assert copies.pop(first) == "mine"
    assert all(text == (root / "nbs/tutorials" / name).read_text() for name, text in copies.items())
    assert len(copies) + 1 == len(list((root / "nbs/tutorials").glob("*.ipynb")))
    done = subprocess.run([scripts / "zebra-nb", "lab"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "pip install 'zebra_nb[lab]'" in done.stderr


def test_wheel_has_the_command(scripts: Path, tmp_path: Path):
    "`zebra-nb --help` names the stages."
    text = run(scripts / "zebra-nb", "--help", cwd=tmp_path)
    for stage in ("demo", "simulate", "train-vqvae", "tokenizer", "train-nsp", "eval-nsp", "lab"):
        assert stage in text


def test_wheel_runs_the_first_stage(scripts: Path, tmp_path: Path):
    "`zebra-nb simulate` writes a file of fields."
    out = tmp_path / "fields.h5"
    run(scripts / "zebra-nb", "simulate", "--output", out, "--n_frames", 4, "--num_points", 32, cwd=tmp_path)
    with h5py.File(out) as file:
        shapes = [field.shape for field in file["fields"].values()]
    assert shapes and all(shape == (4, 32, 32) for shape in shapes)


def seconds_to_import(statement: str, cwd: Path) -> float:
    "How long the statement takes in a new interpreter that has JAX and Equinox already."
    code = f"import jax, equinox, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(run(sys.executable, "-c", code, cwd=cwd))


def test_import_is_quick(tmp_path: Path):
    "`import zebra_nb.vqvae` adds under half a second: heavy libraries are imported where they are used."
    run(sys.executable, "-c", "import zebra_nb.vqvae", cwd=tmp_path)  # compiles the bytecode
    times = [seconds_to_import("import zebra_nb.vqvae", tmp_path) for _ in range(5)]
    assert min(times) < 0.5, f"importing took {times} s"


def imports(path: Path) -> set[str]:
    "The top-level names of all the modules that a file imports, wherever in the file."
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in plain | froms}


@pytest.mark.parametrize("path", modules, ids=lambda path: path.stem)
def test_no_module_unpickles(path: Path):
    "No module imports pickle or asks NumPy for it: loading a file of ours never executes code from it."
    assert not imports(path) & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    asked = [kw for call in calls for kw in call.keywords if kw.arg == "allow_pickle"]
    assert all(isinstance(kw.value, ast.Constant) and kw.value.value is False for kw in asked)
