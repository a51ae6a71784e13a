"""The wheel: every package, the default tokenizer, and no test; it trains in an empty folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_folder_of_the_package_is_listed():
    """setuptools finds packages by itself only where none has another folder."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts)
               for path in ROOT.glob("minids/**/*.py")}
    assert set(listed) == folders | {"minids.default_tokenizer"}


def run(*command: str, cwd: Path, **environment) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=os.environ | environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def has_setuptools() -> bool:
    """Return whether a setuptools as new as pyproject.toml asks for is installed."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_setuptools(), reason="building a wheel needs setuptools 77 or newer")
def test_a_wheel_trains_in_an_empty_folder(tmp_path):
    wheels, site, empty = (tmp_path / name for name in ("wheels", "site", "empty"))
    clone = tmp_path / "clone"
    for folder in ("minids", "data/tokenizer"):
        shutil.copytree(ROOT / folder, clone / folder,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, clone)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(clone),
        cwd=tmp_path)
    (wheel,) = wheels.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"minids", f"{wheel.name[:12]}.dist-info"}
    for file in (ROOT / "data" / "tokenizer").iterdir():
        packed = zipfile.ZipFile(wheel).read(f"minids/default_tokenizer/{file.name}")
        assert packed == file.read_bytes()
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    empty.mkdir()
    told = run("-m", "minids.train", "--preset", "nano", "--steps", "2", cwd=empty,
               PYTHONPATH=str(site), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "run folder" in told
    assert os.listdir(empty) == ["runs"] and any((tmp_path / "cache" / "minids").glob("*/*.bin"))
    where = run("-c", "import minids; print(minids.__file__)", cwd=empty, PYTHONPATH=str(site))
    assert Path(where.strip()) == site / "minids" / "__init__.py"
