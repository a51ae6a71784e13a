"""The pages agree with the code and with each other: flags, trees, links, paths, address, version.

Each check is a function that returns a list of faults, so that a wrong page can be shown to fail.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import minids
from minids.lab import flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "minids/README.md", "notebooks/README.md", "figures/README.md",
         "CHANGELOG.md"]
OURS = ("minids/", "tests/", "notebooks/", "figures/", "data/", ".ci/")
MADE = ("runs/", "data/cache")  # by the programs
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: str, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    faults = []
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        link = "".join(link)  # one of the two forms
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists():
            faults.append(link)
        elif anchor and anchor not in anchors(target.read_text("utf-8") if name else text):
            faults.append(link)
    return faults


def absent_paths(text: str) -> list[str]:
    """Return the paths in backticks that look like the repository's own and do not exist."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    words = [span for span in re.findall(r"`([^`\s]+)`", prose) if re.fullmatch(r"[\w./-]+", span)]
    named = [w for w in words if w.startswith(OURS) or re.search(r"\w\.(py|md|cff|toml|ipynb)$", w)]
    return [w for w in named if not w.startswith(MADE) and not (ROOT / w).exists()]


def tree(text: str) -> list[str]:
    """Return the paths of the tree in a page: the fenced block that begins with `minids/`."""
    block = re.search(r"^```\n(minids/\n.*?)^```", text, re.M | re.S)[1]
    found, above = [], {}
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        above = {d: name for d, name in above.items() if d < depth} | {depth: line.split()[0]}
        found.append("".join(above.values()))
    return found


def misplaced(paths: list[str]) -> list[str]:
    """Return the paths that do not exist, are no folder though they look so, or come twice."""
    return [path for path in paths if not (ROOT / path).exists() or paths.count(path) > 1
            or path.endswith("/") != (ROOT / path).is_dir()]


def unnamed(paths: list[str]) -> list[str]:
    """Return the package's files and folders that a tree leaves out."""
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "minids").rglob("*.py")]
    folders = {f"{path.rpartition('/')[0]}/" for path in files}
    inside = [path for path in files if not path.endswith("/__init__.py")]
    return sorted({*inside, *folders, "minids/__init__.py"} - {*paths})


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_exist(page):
    assert broken_links(page, read(page)) == []
    assert absent_paths(read(page)) == []


def test_a_wrong_link_or_path_is_noticed():
    text = "[a](LICENSE) [b](gone.md) [c](minids/README.md#the-house) [d](minids/README.md#gone) " \
           "[e](#here) [f](#gone) `minids/train.py` `minids/gone.py` `gone.py` `runs/a.py`\n# Here"
    assert broken_links("README.md", text) == ["gone.md", "minids/README.md#gone", "#gone"]
    assert broken_links("README.md", '<img src="gone"><source srcset="LICENSE">') == ["gone"]
    assert broken_links("minids/README.md", "[a](../README.md) [b](README.md) [c](LICENSE)") == [
        "LICENSE"]
    assert absent_paths(text) == ["minids/gone.py", "gone.py"]


def test_trees_name_what_is_there():
    assert misplaced(tree(read("README.md"))) == []
    assert misplaced(tree(read("minids/README.md"))) == []
    assert unnamed(tree(read("minids/README.md"))) == []


def test_a_wrong_tree_is_noticed():
    paths = tree("```\nminids/\n  gone/   no folder\n    a.py   in it\n  train.py  here\n```\n")
    assert paths == ["minids/", "minids/gone/", "minids/gone/a.py", "minids/train.py"]
    assert misplaced(paths) == ["minids/gone/", "minids/gone/a.py"]
    assert misplaced(["minids/model", "LICENSE", "LICENSE"]) == ["minids/model", *["LICENSE"] * 2]
    assert "minids/train.py" not in unnamed(paths)
    assert {"minids/model/", "minids/model/mla.py", "minids/__init__.py"} <= set(unnamed(paths))


def test_the_page_of_flags_equals_the_settings():
    """`python -m minids.lab.flags --page minids/README.md` repairs it."""
    shown = read("minids/README.md").partition(flags.BEGIN)[2].partition(flags.END)[0]
    assert shown.strip().splitlines() == flags.markdown().strip().splitlines()


def test_the_address_stands_once():
    """Nothing but pyproject.toml decides where the repository is; a placeholder is not repeated."""
    address = PROJECT.get("urls", {}).get("Repository", ".invalid")
    shown = "REPOSITORY" if ".invalid" in address else address
    assert f"git clone {shown} minids\n" in read("README.md")
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation.get("repository-code", "REPOSITORY") == shown


def test_citation_and_changelog_name_the_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= set(citation)
    assert citation["version"] == minids.__version__
    assert citation["authors"] == PROJECT["authors"]
    assert f"## [{minids.__version__}]" in read("CHANGELOG.md")


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"^```python\n(.*?)^```", read("README.md"), re.M | re.S)
    exec(code.replace('"tiny"', '"nano"'), {})
    assert (tmp_path / "tiny-hf" / "config.json").is_file()
