"""Run every test: the notebooks by nbdev_test, then pytest on tests/. Further arguments go to pytest."""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parents[1]
scripts = Path(sysconfig.get_path("scripts"))  # so that an environment's Python is enough, activated or not
workers = min(4, os.cpu_count() or 1)


def run(*command: str, **env: str) -> bool:
    "Whether the command, run in the project's root, succeeds; a choice of tests may leave none of a file (pytest's 5)."
    path = os.pathsep.join([str(scripts), os.environ.get("PATH", "")])
    code = subprocess.run(command, cwd=root, env={**os.environ, "PATH": path, **env}).returncode
    return code == 0 or (code == 5 and len(sys.argv) > 1)


def main() -> None:
    # One notebook per core and one thread per notebook: left alone, XLA starts a thread per core in each of them.
    threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") if workers > 1 else {}
    # Most of the time goes into compiling, and the same programs are met in several notebooks and processes.
    cache = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=1".strip(),  # a fifth less
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Who meets an entry that another process is still writing compiles for itself, and need not say so.
        "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry:UserWarning",
    }
    with tempfile.TemporaryDirectory() as folder:
        cache["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
        notebooks = run(
            *(sys.executable, str(scripts / "nbdev_test")),
            *("--n_workers", str(workers), "--timing", "--do_print"),
            **threads,
            **cache,
        )
        apart = ("-n", str(workers), "--dist", "loadfile") if workers > 1 else ()  # a process per file
        pytest, browser = (sys.executable, "-m", "pytest", *sys.argv[1:]), "tests/test_browser.py"
        tests = run(*pytest, "tests", f"--ignore={browser}", *apart, **cache)
        tests = run(*pytest, browser, **cache) and tests  # alone, since it counts frames a second
    if not notebooks:
        sys.exit("nbdev_test failed: see the notebooks listed above.")
    sys.exit(not tests)


if __name__ == "__main__":
    main()
