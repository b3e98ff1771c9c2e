"""Run every test: nbdev_test on each notebook, then pytest on tests/. Further arguments go to pytest."""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parents[1]
scripts = Path(sysconfig.get_path("scripts"))  # so that an environment's Python is enough, activated or not
workers = min(4, os.cpu_count() or 1)


def run(*command: str, **options) -> subprocess.CompletedProcess:
    "The end of the command, run in the project's root."
    path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, **options.pop("env", {})}
    return subprocess.run([sys.executable, *command], cwd=root, env=env, **options)


def passes(notebook: Path, env: dict[str, str]) -> bool:
    "Whether nbdev_test passes a notebook: in a process of its own, since compiled programs stay in one to its end."
    start, name = time.monotonic(), notebook.relative_to(root)
    done = run(str(scripts / "nbdev_test"), "--path", str(notebook), env=env, text=True, capture_output=True)
    said = "passed" if done.returncode == 0 else f"FAILED\n{done.stdout}{done.stderr}"
    print(f"{name} ({time.monotonic() - start:.0f} s): {said}", flush=True)
    return done.returncode == 0


def main() -> None:
    # One notebook per core and one thread per notebook: left alone, XLA starts a thread per core in each of them.
    threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") if workers > 1 else {}
    # Compiling is most of the work, and most programs run a few times only: they are compiled quickly, not well, and
    # kept for the other notebooks and processes that meet them.
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    cache = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip(),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Who meets an entry that another process is still writing compiles for itself, and need not say so.
        "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",
    }
    with tempfile.TemporaryDirectory() as folder:
        cache["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
        # The last chapters first: they take longest, and whoever ends early should find something short to do.
        notebooks = sorted(nbglob(root / "nbs", as_path=True), reverse=True)
        with ThreadPoolExecutor(workers) as pool:
            passed = list(pool.map(lambda notebook: passes(notebook, cache | threads), notebooks))
        apart = ("-n", str(workers), "--dist", "loadfile") if workers > 1 else ()  # a process per file
        pytest, browser = ("-m", "pytest", *sys.argv[1:]), "tests/test_browser.py"
        tests = [run(*pytest, "tests", f"--ignore={browser}", *apart, env=cache).returncode]
        tests.append(run(*pytest, browser, env=cache).returncode)  # alone, since it counts frames a second
    if failed := [str(n.relative_to(root)) for n, ok in zip(notebooks, passed, strict=True) if not ok]:
        sys.exit(f"nbdev_test failed on {', '.join(failed)}: see above.")
    nothing_chosen = {5} if len(sys.argv) > 1 else set()  # a choice of tests may leave none of a file (pytest's 5)
    sys.exit(not set(tests) <= {0} | nothing_chosen)


if __name__ == "__main__":
    main()
