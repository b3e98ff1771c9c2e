"""A run that is killed, stopped, disturbed, or goes on for long ends as one that nobody touched, to the last bit."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from small_run import CONFIG, Child, last_step, rows, same_end, sessions

KILLS, LAST = 20, CONFIG.max_steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    "The run that nobody touched."
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Child(out, cache=cache).end(120) == (0, "finished")
    assert [r["step"] for r in rows(out)] == list(range(1, LAST + 1))
    assert [(s["ended"], s["at_step"]) for s in sessions(out)] == [("finished", LAST)]
    return out


def half_written(out: Path) -> set[tuple[str, int]]:
    "The temporary folders of checkpoints, by name and inode."
    found = set()
    for path in out.glob("checkpoints/*.orbax-checkpoint-tmp"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # it is whole by now
            continue
    return found


def kill_in_the_midst(child: Child, when: str, limit: int, rng: np.random.Generator):
    "Sends SIGKILL at a moment of this kind; at the latest when the run has come to step `limit`."
    before, moment = half_written(child.out), time.monotonic() + rng.uniform(0.0, 2.5)
    reached = lambda: last_step(child.out) >= limit
    come = {
        "start": lambda: time.monotonic() > moment - 1.5,
        "any time": lambda: time.monotonic() > moment or reached(),
        "checkpoint": lambda: bool(half_written(child.out) - before),
        "a little later": lambda: bool(half_written(child.out) - before),
        "end": lambda: last_step(child.out) == LAST,
    }
    child.wait_until(come[when])
    if when in ("a little later", "end"):
        time.sleep(rng.uniform(0, 0.05))
    child.process.kill()
    assert child.end() == (-signal.SIGKILL, "")


def test_a_run_that_is_killed_twenty_times(undisturbed: Path, cache: Path, tmp_path: Path):
    "SIGKILL while it starts, restores, steps, writes a checkpoint or ends: resumed, it ends as if nothing had been."
    out, rng = tmp_path / "run", np.random.default_rng(0)
    kinds = 3 * ["start"] + 6 * ["any time"] + 5 * ["checkpoint"] + 5 * ["a little later"]
    begun, torn = 0, 0
    for life, when in enumerate([*rng.permutation(kinds), "end"]):
        kill_in_the_midst(Child(out, cache=cache, resume=True), when, 3 * life + 5, rng)
        torn += bool(half_written(out))
        begun = max(begun, len(sessions(out)) if (out / "run.json").exists() else 0)
    assert torn >= 5  # of the kills came while a checkpoint was written
    assert Child(out, cache=cache, resume=True).end() == (0, "finished")
    ends = [s["ended"] for s in sessions(out)]
    assert ends == ["killed"] * begun + ["finished"] and begun >= KILLS // 2  # the others came before it had the folder
    assert same_end(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop(number: signal.Signals, undisturbed: Path, cache: Path, tmp_path: Path):
    "SIGTERM and Ctrl-C: the step is finished and kept, one sentence says to resume; resumed, it ends as if nothing had been."
    out = tmp_path / "run"
    child = Child(out, cache=cache)
    child.wait_until(lambda: last_step(out) >= 7)
    os.kill(child.process.pid, number)
    code, words = child.end()
    stopped = last_step(out)
    assert code == 128 + number and stopped < LAST
    assert words == f"{number.name} at step {stopped}: what was learned is kept, resume to go on"
    assert max(int(p.name) for p in (out / "checkpoints").iterdir()) == stopped
    assert [(s["ended"], s["at_step"]) for s in sessions(out)] == [("interrupted", stopped)]
    assert Child(out, cache=cache, resume=True).end() == (0, "finished")
    assert [(s["from_step"], s["ended"]) for s in sessions(out)] == [(0, "interrupted"), (stopped, "finished")]
    assert same_end(out, undisturbed)


def test_two_runs_in_one_folder(undisturbed: Path, cache: Path, tmp_path: Path):
    "The second is refused at once, with and without `resume`; the first does not notice."
    out = tmp_path / "run"
    first = Child(out, cache=cache, pause=0.05)
    first.wait_until(lambda: last_step(out) >= 4)
    for resume in (False, True):
        code, words = Child(out, cache=cache, resume=resume).end()
        assert code == 2 and words.startswith(f"another process is training into '{out}'")
        assert first.process.exitcode is None
    assert first.end() == (0, "finished")
    assert len(sessions(out)) == 1 and same_end(out, undisturbed)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_long_run(cache: Path, tmp_path: Path):
    "Two thousand steps with checkpoints, history and validation: memory, threads and open files stay as they are after the first 400."
    options = dict(max_steps=2000, checkpoint_every=100, validate_every=100, log_every=50)
    child = Child(tmp_path / "run", cache=cache, options=options, measure=tmp_path / "measured.jsonl")
    assert child.end(120) == (0, "finished")
    found = [json.loads(line) for line in (tmp_path / "measured.jsonl").read_text().splitlines()]
    late = [row for row in found if row["step"] >= 400]
    assert late[-1]["step"] == 1950
    assert max(row["megabytes"] for row in late) - late[0]["megabytes"] < 40, found  # a quarter of a state a step
    assert max(row["threads"] for row in late) - late[0]["threads"] <= 4, found
    assert max(row["files"] for row in late) - late[0]["files"] <= 4, found
