"""A run's folder: free ones by number, and a lock that no killed process keeps."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import training_runs
from filelock import FileLock
from training_runs import run_train

from minids.runs.folders import LOCK, free_folders, locked
from minids.runs.open import is_run

ROOT = Path(__file__).resolve().parents[2]
home, flags = training_runs.home, training_runs.flags
STARTS = int(os.environ.get("MINIDS_STARTS", "1"))  # of two trainings at once, in slow tests

WORKER = """
import sys
from pathlib import Path
from minids.runs.folders import free_folders, locked
print("ready", flush=True)
sys.stdin.readline()
named, path = sys.argv[1:]
try:
    with locked([Path(path)] if named == "named" else free_folders(Path(path))) as folder:
        (folder / "work").write_text("")
        print(folder, flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start_two(named: str, path: Path) -> list[subprocess.Popen]:
    """Two processes that ask for a folder at the same moment."""
    both = [subprocess.Popen([sys.executable, "-c", WORKER, named, str(path)], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    return both


def answers(both: list[subprocess.Popen]) -> list[str]:
    found = [process.stdout.readline().strip() for process in both]
    for process in both:
        process.communicate("end\n")
    return found


@pytest.mark.parametrize("attempt", range(5))
def test_of_two_at_once_one_runs_and_one_says_why_not(tmp_path, attempt):
    run = tmp_path / "run"
    found = sorted(answers(start_two("named", run)), key=len)
    assert found[0] == str(run) and found[1].startswith(f"out = '{run}' is not valid: another pro")
    assert [path.name for path in run.iterdir()] == ["work"]


@pytest.mark.parametrize("attempt", range(5))
def test_two_that_name_no_folder_take_two(tmp_path, attempt):
    found = answers(start_two("free", tmp_path / "runs/x"))
    assert sorted(found) == [str(tmp_path / f"runs/{name}") for name in ("x", "x-2")]


def test_a_killed_process_keeps_no_lock(tmp_path):
    run = tmp_path / "run"
    both = start_two("free", run)
    first = next(process for process in both if process.stdout.readline().strip() == str(run))
    for process in both:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert first.returncode == -signal.SIGKILL and (run / LOCK).exists()
    with locked([run]) as folder:
        assert folder == run
    assert not (run / LOCK).exists() and (run / "work").exists()


def test_a_free_folder(tmp_path):
    names = []
    for _ in range(3):
        names.append(next(free_folders(tmp_path / "x")).name)
        (tmp_path / names[-1]).mkdir()
    assert names == ["x", "x-2", "x-3"]
    (tmp_path / "x" / LOCK).write_text("")  # of a run that was killed while it started
    assert next(free_folders(tmp_path / "x")).name == "x"


def test_what_the_lock_made_is_removed_and_nothing_else(tmp_path):
    with locked([tmp_path / "runs/x"]):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / "runs").mkdir()
    with locked([tmp_path / "runs/x"]) as folder:
        (folder / "loss.png").write_text("")
    assert [path.name for path in (tmp_path / "runs/x").iterdir()] == ["loss.png"]


def test_a_program_keeps_out_of_a_folder_in_use(home, flags, tmp_path, monkeypatch):
    with locked([tmp_path / "run"]):
        said = run_train(*flags, "--out", str(tmp_path / "run"))
    training_runs.assert_refused(said, "out = ", "another process works in that folder")
    monkeypatch.chdir(tmp_path)
    with locked([Path("runs/nano")]):
        said = run_train(*flags, "--steps", "1")
    assert "run     runs/nano-2" in said.out and is_run(tmp_path / "runs/nano-2")
    assert not (tmp_path / "runs/nano").exists()


def test_a_place_without_files_is_refused_by_its_field(home, flags, monkeypatch):
    """A run that names no folder finds out when it makes one; root may write in /proc."""
    monkeypatch.chdir("/proc")
    said = run_train(*flags, "--steps", "1")
    training_runs.assert_refused(said, "out = 'runs/nano' is not valid: it must be a path that can")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(STARTS))
@pytest.mark.parametrize("named", [True, False])
def test_two_trainings_at_once(home, flags, tmp_path, named, attempt):
    """Start the program twice, a few times: which of the two comes first is left to chance."""
    words = ["--out", str(tmp_path / "run")] if named else []
    both = [subprocess.Popen([sys.executable, "-m", "minids.train", *flags, *words], cwd=tmp_path,
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    status = sorted(process.returncode for process in both)
    if not named:
        assert status == [0, 0] and is_run(tmp_path / "runs/nano-2")
        return
    assert status == [0, 2]
    [said] = [error for error in errors if error]
    assert said.count("\n") == 1 and ("another process" in said or "holds a run already" in said)


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Its owner ended between our opening of the file and our lock: nobody else would see it."""
    acquire, removed = FileLock.acquire, []

    def slow(self, *args, **kwargs):
        acquire(self, *args, **kwargs)
        if not removed:
            removed.append((tmp_path / "run/.lock").unlink())

    monkeypatch.setattr(FileLock, "acquire", slow)
    with locked([tmp_path / "run"]):
        assert removed and (tmp_path / "run/.lock").exists()
