"""The notebooks' first cell on an empty machine, in a clone and outside one; the badge for Colab.

The cell runs in a process of its own that starts in a given folder. torch is replaced there because
its import takes seconds; `pip install` is printed and not done.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minids.lab import opening

ROOT = Path(__file__).resolve().parents[2]
GITHUB = "https://github.com/someone/minids"
FAKE_TORCH = """
import subprocess, sys, types
sys.modules["torch"] = types.SimpleNamespace(set_num_threads=print, get_num_threads=lambda: 3)
really = subprocess.run
def run(command, **more):
    if "pip" not in command:
        return really(command, **more)
    print(*command[1:-1], command[-1].split("/")[-1])
subprocess.run = run
"""
FAKE_COLAB = 'sys.modules["google.colab"] = types.ModuleType("google.colab")\n'
WHERE = "import minids; print(Path(minids.__file__).resolve().parents[1])"
INSTALLED = "-m pip install --quiet -r requirements.txt\n"


def run_cell(folder: Path, before: str, after: str = "", address: str = "",
             change=("", "")) -> subprocess.CompletedProcess:
    """Run the first cell in `folder`; change: what in the cell becomes what."""
    cell = opening.CELL.format(address=address).replace(*change)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-c", "\n".join([before, cell, after])], cwd=folder,
                          capture_output=True, text=True, timeout=600, env=alone)


@pytest.fixture
def repository(tmp_path) -> str:
    """Return the address of a small repository: a package, requirements, one commit."""
    folder = tmp_path / "repository"
    (folder / "minids" / "lab").mkdir(parents=True)
    (folder / "minids" / "__init__.py").write_text("")
    (folder / "minids" / "lab" / "opening.py").write_text(
        "def explain_interrupts(): pass\ndef keep_freed_memory(): pass")
    (folder / "requirements.txt").write_text("torch\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b",
                                                   "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return f"file://{folder}"


@pytest.mark.parametrize("start", ["clone/notebooks", "clone", "."])
def test_the_cell_finds_the_clone(start, tmp_path):
    """From its own folder, from the root, and from the folder that holds the clone."""
    (tmp_path / "clone").symlink_to(ROOT)
    run = run_cell(tmp_path / start, FAKE_TORCH, WHERE)
    assert (run.stdout, run.stderr) == (f"2\n{ROOT}\n", "")


@pytest.mark.parametrize("before, change", [
    (FAKE_TORCH + FAKE_COLAB, ("", "")),
    (FAKE_TORCH, ('fetch = "google.colab" in sys.modules', "fetch = True"))],
    ids=["Colab", "the user asks for it"])
def test_an_empty_machine_clones_and_installs(before, change, repository, tmp_path):
    """Twice, because a runtime that restarts finds the clone of the first time."""
    empty = tmp_path / "content"
    empty.mkdir()
    for _ in range(2):
        run = run_cell(empty, before, WHERE, repository, change)
        assert (run.stdout, run.stderr) == (f"{INSTALLED}2\n{empty / 'minids'}\n", "")
        shutil.rmtree(tmp_path / "repository", ignore_errors=True)


def test_colab_inside_a_clone_only_installs():
    run = run_cell(ROOT / "notebooks", FAKE_TORCH + FAKE_COLAB, WHERE, "file:///nowhere")
    assert run.stdout == f"{INSTALLED}2\n{ROOT}\n"


def test_a_clone_of_ones_own_is_not_touched():
    assert "pip" not in run_cell(ROOT / "notebooks", FAKE_TORCH, address=GITHUB).stdout


@pytest.mark.parametrize("before, address, told", [
    (FAKE_TORCH, "", "minids is not here: open the notebook inside a clone of its repository"),
    (FAKE_TORCH + FAKE_COLAB, "",
     "minids is not here: open the notebook inside a clone of its repository"),
    (FAKE_TORCH, GITHUB, "minids is not here: open the notebook inside a clone of its repository, "
                         "or set fetch = True in this cell"),
    (FAKE_TORCH + FAKE_COLAB, "file:///nowhere",
     "git cannot clone file:///nowhere: is this machine online?")],
    ids=["no clone", "Colab, no address", "no clone, an address", "Colab, a wrong address"])
def test_without_minids_one_sentence_says_what_to_do(before, address, told, tmp_path):
    run = run_cell(tmp_path, before, address=address)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1] == f"AssertionError: {told}"


def new() -> nbformat.NotebookNode:
    """Return a notebook that has a title and one cell of code."""
    return new_notebook(cells=[new_markdown_cell("# 07 · MTP\n\n**The question.** Why?"),
                               new_code_cell("1 + 1")])


def test_a_badge_comes_and_goes_with_the_address():
    nb = new()
    for address in (GITHUB, GITHUB, f"{GITHUB}.git", ""):
        opening.open_with(nb, address, "07_mtp.ipynb")
        badge = opening.badge(address, "07_mtp.ipynb")
        assert bool(badge) == bool(address)
        assert nb.cells[0].source == "\n\n".join(
            filter(None, ["# 07 · MTP", badge, "**The question.** Why?"]))
        assert f'REPOSITORY = "{address}"' in nb.cells[1].source
        assert nb.cells[1].metadata["jupyter"]["source_hidden"]
    assert opening.badge(GITHUB, "a.ipynb").endswith(
        "(https://colab.research.google.com/github/someone/minids/blob/main/notebooks/a.ipynb)")


def test_colab_opens_what_github_holds_and_nothing_else():
    assert opening.badge("https://example.org/someone/minids", "a.ipynb") == ""


@pytest.mark.parametrize("line, address", [(f'Repository = "{GITHUB}/"', GITHUB), ("", ""),
                                           ('Repository = "https://undecided.invalid/a"', "")])
def test_the_address_comes_from_pyproject(line, address, tmp_path):
    page = tmp_path / "pyproject.toml"
    page.write_text(f'[project]\nname = "minids"\n[project.urls]\n{line}\n')
    assert opening.address_of(page) == address


def test_the_program_writes_the_opening(tmp_path, capsys):
    path = tmp_path / "07_mtp.ipynb"
    nbformat.write(new(), path)
    for _ in range(2):
        opening.main(["--folder", str(tmp_path)])
        told = opening.address_of() or "no address: it is undecided"
        assert capsys.readouterr().out == f"1 notebooks open with {told}\n"
        nb = nbformat.read(path, 4)
        assert nb.cells[1].source == opening.CELL.format(address=opening.address_of())


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        opening.main(["--folder", str(tmp_path)])


def test_an_interrupted_cell_says_how_to_go_on(capsys):
    """The kernel still counts the cell as failed, so that Run All stops there."""
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    try:
        opening.explain_interrupts()
        done = shell.run_cell("raise KeyboardInterrupt")
        assert capsys.readouterr().out == f"{opening.GO_ON}\n"
        assert isinstance(done.error_in_exec, KeyboardInterrupt)
        assert "ZeroDivisionError" in (shell.run_cell("1 / 0"), capsys.readouterr().out)[1]
    finally:
        InteractiveShell.clear_instance()


def test_outside_jupyter_nothing_is_explained(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    opening.explain_interrupts()
