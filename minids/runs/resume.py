"""One set of rules for all programs: which folder a run gets, and what a resumed run may change."""

import contextlib
import dataclasses
from pathlib import Path

from minids.base.files import read_json
from minids.runs.open import CONFIG, folder_of, is_run, read_config
from minids.runs.settings import LearnArgs


def stored_run(program: str, cls: type[LearnArgs], given: dict) -> tuple[LearnArgs, dict] | None:
    """Return the settings and the config.json of the run that the flags resume; None if it is new.

    program: its name in config.json
    cls: its settings
    given: flags; only those in `cls.may_change` may differ from the stored settings
    Raises `ValueError` for a run folder that is taken, damaged, or of another configuration.
    """
    out, resume = given.get("out", ""), given.get("resume", False)
    if not (out or resume):
        return None
    run = Path(out) if out else newest_run(program, given.get("preset", ""))
    if not is_run(run):
        return None
    if not resume:
        raise ValueError(f"out = {out!r} holds a run already: continue it with --resume, or name "
                         "another folder")
    config = read_config(run, program, cls)
    changed = {k: v for k, v in given.items() if k in cls.may_change} | {"out": str(run)}
    fixed = {k: v for k, v in given.items() if k not in cls.may_change}
    stored = cls(**config[program])
    refuse_changes(run, dataclasses.asdict(stored), fixed)
    return dataclasses.replace(stored, **changed), config


def settings(program: str, cls: type[LearnArgs], given: dict, suffix: str) -> LearnArgs:
    """Return the settings of a run that begins with another one's weights, or is resumed.

    program, cls, given: see `stored_run`; `cls` has `for_preset`
    suffix: what the new folder's name adds to the other run's
    """
    if stored := stored_run(program, cls, given):
        return stored[0]
    if not given.get("from_run"):
        raise ValueError("from = '' is not valid: name the run to begin with, --from RUN")
    before = folder_of(given["from_run"])
    out = given.get("out") or str(free_folder(Path("runs") / (before.name + suffix)))
    return cls.for_preset(**given | {"out": out})


def refuse_changes(run: Path, stored: dict, given: dict) -> None:
    """Raise `ValueError` for a flag that differs from what the run began with."""
    for name, value in given.items():
        if stored[name] != value:
            raise ValueError(f"{name} = {value!r} is not valid: the run in {run} has "
                             f"{stored[name]!r}, and a resumed run keeps its configuration")


def newest_run(program: str, preset: str = "") -> Path:
    """Return the run in runs/ that this program wrote to last.

    preset: only runs of this preset; "" allows any
    """
    found = []
    for file in Path("runs").glob(f"*/{CONFIG}"):
        with contextlib.suppress(ValueError, AttributeError):
            stored = read_json(file).get(program, {})
            if stored and preset in ("", stored.get("preset")):
                found.append(file)
    if not found:
        kind = f" with preset {preset!r}" if preset else ""
        raise ValueError(f"resume: runs/ holds no run of minids.{program}{kind}; name its folder "
                         "with --out")
    return max(found, key=lambda file: file.stat().st_mtime).parent


def free_folder(wanted: Path) -> Path:
    """Return `wanted`, or the first free one of NAME-2, NAME-3, .. if it is taken."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
