"""Go through a notebook as a learner does: a real JupyterLab, a real browser, Run All, a figure.

The other tests run the notebooks without a page. Here a server is started on a small tree of its
own, beside the repository, and Chromium opens a notebook there. `troubles` says in words what is
wrong with what came out. It is tried on wrong notebooks too.
"""

import contextlib
import http.client
import importlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from kept_port import kept_port
from nbformat.v4 import new_code_cell, new_notebook

psutil = pytest.importorskip("psutil", reason="psutil, a part of ipykernel, is not installed")
for package in ("playwright", "jupyterlab"):  # imported by what needs them: it takes seconds
    if not find_spec(package):
        pytest.skip(f"{package} is not installed", allow_module_level=True)
BROWSERS = "chromium", "chromium-browser", "google-chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is on the PATH"),
    pytest.mark.skipif(sys.platform == "win32", reason="needs process groups and symlinks"),
]

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "notebooks" / "00_map.ipynb"
START = 300  # seconds that the server, and then the page, may take to appear
LIMIT = 600  # seconds that the kernel's start and all cells may take together

# The notebook's panel in the page; nothing until JupyterLab has opened it.
PANEL = """
const panel = window.jupyterapp?.shell && [...window.jupyterapp.shell.widgets('main')].find(
    widget => widget.context?.path === path && widget.content?.widgets);
const sleep = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
"""
OPENED = f"path => {{ {PANEL} return Boolean(panel); }}"
# The toolbar says "idle" before the kernel is connected, and a run then would hang for ever.
RUN_ALL = f"""async ([path, limit]) => {{ {PANEL}
    const run = async () => {{
        await panel.context.ready;
        await panel.sessionContext.ready;
        const kernel = () => panel.sessionContext.session?.kernel;
        while (kernel()?.connectionStatus !== 'connected' || kernel().status !== 'idle')
            await sleep(0.1);
        window.jupyterapp.shell.activateById(panel.id);
        await window.jupyterapp.commands.execute('notebook:run-all-cells');
        return true;
    }};
    return Promise.race([run(), sleep(limit).then(() => false)]);
}}"""
CELLS = f"path => {{ {PANEL} return panel.content.model.toJSON().cells; }}"
# A page holds only what is near the screen, so it must scroll to a cell before it can see it.
WIDTHS = "async ([path, places]) => {" + PANEL + """
    const widths = [];
    for (const place of places) {
        await Promise.race([panel.content.scrollToItem(place, 'center'), sleep(60)]);
        const pictures = () => [...panel.content.widgets[place].node.querySelectorAll(
            '.jp-OutputArea-output img')].filter(picture => picture.getClientRects().length);
        for (let i = 0; i < 600 && !(pictures().length && pictures().every(p => p.complete)); i++)
            await sleep(0.1);
        for (const picture of pictures()) {
            picture.scrollIntoView({block: 'center'});
            await sleep(0.2);
        }
        widths.push(...pictures().map(picture => picture.naturalWidth));
    }
    return widths;
}"""
STOP = f"""async path => {{ {PANEL}
    await Promise.race([panel?.sessionContext.shutdown(), sleep(10)]);
}}"""


@dataclass(frozen=True)
class Server:
    """tree: the folder that it shows; address: with port; token: what a page must know"""

    tree: Path
    address: str
    token: str


@dataclass(frozen=True)
class Seen:
    """What a page shows after Run All.

    finished: whether Run All came to its end; cells: the notebook's; widths: the figures', in
    pixels, 0 where the browser cannot draw one
    """

    finished: bool
    cells: list[dict]
    widths: list[int]

    @property
    def code(self) -> list[dict]:
        """Return the code cells that are not blank, in order."""
        return [c for c in self.cells if c["cell_type"] == "code" and text_of(c["source"]).strip()]


def text_of(lines: str | list[str]) -> str:
    """Return as one string what a notebook may store as a list of lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def streams(cell: dict, name: str) -> str:
    """Return what a cell wrote to "stdout" or "stderr"."""
    return "".join(text_of(out["text"]) for out in cell["outputs"] if out.get("name") == name)


def pictures(cell: dict) -> list[dict]:
    """Return the outputs of a cell that contain an image."""
    return [out for out in cell.get("outputs", [])
            if any(kind.startswith("image/") for kind in out.get("data", {}))]


def cell_troubles(number: int, cell: dict) -> list[str]:
    """Return what is wrong with a code cell; number counts from 1."""
    found = []
    if cell["execution_count"] != number:
        found.append(f"cell {number} has the count {cell['execution_count']}")
    for out in cell["outputs"]:
        if out["output_type"] == "error":
            found.append(f"cell {number} stops with {out['ename']}: {out['evalue']}")
        elif "application/vnd.jupyter.error" in out.get("data", {}):
            found.append(f"cell {number} shows an error")
    if streams(cell, "stderr"):
        found.append(f"cell {number} warns: {streams(cell, 'stderr').strip()}")
    return found


def troubles(seen: Seen) -> list[str]:
    """Return what is wrong after Run All, one sentence each."""
    found = [] if seen.finished else ["Run All has not come to its end"]
    for number, cell in enumerate(seen.code, start=1):
        found += cell_troubles(number, cell)
    if not seen.widths:
        found.append("the page shows no figure")
    elif min(seen.widths) == 0:
        found.append("the browser cannot draw a figure")
    return found


def save(nb: nbformat.NotebookNode, path: Path) -> str:
    """Write a notebook without outputs, so that only a new run can number its cells.

    Returns its path in the server's tree, with slashes.
    """
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(nb, path)
    return f"{path.parent.name}/{path.name}"


def save_small(server: Server, name: str, *sources: str) -> str:
    """Write a small notebook of code cells into the server's tree."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = new_notebook(cells=list(map(new_code_cell, sources)), metadata={"kernelspec": kernel})
    return save(nb, server.tree / "notebooks" / f"{name}.ipynb")


def plant(tree: Path) -> None:
    """Make a tree that a notebook takes for the repository; what it writes stays there."""
    (tree / "figures").mkdir(parents=True)
    shutil.copytree(ROOT / "notebooks", tree / "notebooks")
    for part in ["minids", "data"]:
        (tree / part).symlink_to(ROOT / part, target_is_directory=True)
    (tree / "LICENSE").symlink_to(ROOT / "LICENSE")  # the text of notebook 01


def environment(home: Path, token: str) -> dict[str, str]:
    """Return the server's environment, isolated from the user's Jupyter settings."""
    folders = {name: home / name.lower() for name in [
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
        "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]}
    for folder in folders.values():
        folder.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
    return kept | {name: str(folder) for name, folder in folders.items()} | {
        "JUPYTER_TOKEN": token, "PYTHONDONTWRITEBYTECODE": "1"}


def command(port: int) -> list[str]:
    """Return the command that starts this Python's JupyterLab at a port, without a browser."""
    return [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
            "--ServerApp.root_dir=.", "--LabApp.expose_app_in_browser=True",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]


def answers(port: int) -> bool:
    """Return whether a server answers at a port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/api")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    """Return when the server answers; fail with its log if it does not."""
    late = time.monotonic() + START
    while time.monotonic() < late and process.poll() is None:
        if answers(port):
            return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab does not start:\n{log.read_text()[-3000:]}")


def end(process: subprocess.Popen) -> None:
    """End the server with its process group, and its kernels, which have groups of their own."""
    try:
        kernels = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        kernels = []
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for kernel in kernels:
        with contextlib.suppress(psutil.NoSuchProcess):
            kernel.kill()
    psutil.wait_procs(kernels, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """Run a JupyterLab server for the tests of this module."""
    importlib.import_module("matplotlib.font_manager")  # else a kernel may warn while it builds it
    home = tmp_path_factory.mktemp("jupyterlab")
    tree, log, token = home / "tree", home / "log.txt", secrets.token_hex()
    plant(tree)
    with kept_port() as port, open(log, "wb") as out:
        process = subprocess.Popen(command(port), cwd=tree, env=environment(home, token),
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                   start_new_session=True)
        try:
            wait_for(process, port, log)
            yield Server(tree, f"http://127.0.0.1:{port}", token)
        finally:
            end(process)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Start a headless Chromium."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--disable-background-networking"]
    from playwright.sync_api import sync_playwright
    with sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=BROWSER, args=flags)
        try:
            yield chromium
        finally:
            chromium.close()


@pytest.fixture
def page(browser, tmp_path) -> Iterator:
    """Open a page; its picture is kept beside the test's files, also when the test fails."""
    from playwright.sync_api import Error
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(1000 * START)
    yield page
    with contextlib.suppress(Error):
        page.screenshot(path=tmp_path / "page.png")
    page.close()


@pytest.fixture
def run_all(server, page) -> Iterator:
    """Return a function that opens a notebook, does Run All and returns what the page shows."""
    from playwright.sync_api import Error
    opened = []

    def act(path: str, limit: float = LIMIT) -> Seen:
        opened.append(path)
        page.goto(f"{server.address}/lab/tree/{path}?reset&token={server.token}")
        page.wait_for_function(OPENED, arg=path)
        finished = page.evaluate(RUN_ALL, [path, limit])
        cells = page.evaluate(CELLS, path)
        places = [place for place, cell in enumerate(cells) if pictures(cell)]
        return Seen(finished, cells, page.evaluate(WIDTHS, [path, places]))

    try:
        yield act
    finally:
        for path in opened:
            with contextlib.suppress(Error):
                page.evaluate(STOP, path)


def test_run_all_shows_the_map(server, run_all):
    """The first notebook runs to its end in the page, without an error, and shows its figure."""
    nb = nbformat.read(MAP, as_version=4)
    seen = run_all(save(nb, server.tree / "notebooks" / MAP.name))
    assert troubles(seen) == []
    assert len(seen.code) == sum(cell.cell_type == "code" for cell in nb.cells)
    assert len(seen.widths) == 3 and min(seen.widths) > 300  # a drawing, a figure, one with sliders
    assert (server.tree / "figures" / "00_map.png").is_file()


DOT = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
       "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
SHOW = "from IPython.display import display\ndisplay({{'image/png': '{}'}}, raw=True)"
DRAW = SHOW.format(DOT)


def test_a_wrong_notebook_is_noticed(server, run_all):
    """The checks can fail: a figure that cannot be drawn, a warning, an error."""
    path = save_small(server, "wrong", SHOW.format(DOT[:40]),
                      "import sys\nprint('careful', file=sys.stderr)", "1 / 0")
    assert troubles(run_all(path)) == ["cell 2 warns: careful",
                                       "cell 3 stops with ZeroDivisionError: division by zero",
                                       "the browser cannot draw a figure"]


def test_a_run_that_does_not_end_is_noticed(server, run_all):
    """A cell that takes too long is reported, with the cell that waits for it; the test goes on.

    That no cell follows an error is not looked at: it depends on how fast the page sends them.
    """
    path = save_small(server, "endless", DRAW, "import time\ntime.sleep(600)", "2")
    told = troubles(run_all(path, limit=8))
    assert "Run All has not come to its end" in told
    assert "cell 3 has the count None" in told


def test_an_endless_answer_leaves_the_kernel_alive(server, run_all):
    """A learner's endless loop is reported in words, and the next cell still runs."""
    first = next(cell.source for cell in nbformat.read(MAP, as_version=4).cells
                 if cell.cell_type == "code")
    path = save_small(server, "loop", first, "from minids.lab.lesson import review",
                      "def f(x):\n    while True: pass", "review(f, [((1,), 1, '')])",
                      "print('alive')", DRAW)
    seen = run_all(path)
    assert troubles(seen) == []
    assert "not finished" in streams(seen.code[3], "stdout")
    assert streams(seen.code[4], "stdout") == "alive\n"
