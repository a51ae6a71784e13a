"""The page of flags: what is shared is printed once, and only what is between the marks changes.

That `minids/README.md` equals it is a test of `tests/test_reference.py`.
"""

from dataclasses import dataclass

import pytest

from minids.base.fields import Settings, option
from minids.lab import flags
from minids.runs.settings import TrainArgs


@dataclass(frozen=True)
class Shared(Settings):
    """Settings that two programs share."""

    steps: int = option(5, "steps, 100 % of them", low=1)


@dataclass(frozen=True)
class Own(Shared):
    """One program's."""

    steps: int = option(7, "steps", low=1)
    kind: str = option("", "a or b*", ("", "a", "b"))
    zero: int = option(1, "what replicas share", (0, 1))


@dataclass(frozen=True)
class WithPresets(Shared):
    """One program's, whose default preset has another number of steps; it declares none of them."""

    @classmethod
    def for_preset(cls, name: str) -> "WithPresets":
        assert name == "tiny"
        return cls(steps=9)


def test_a_class_that_is_shared_is_printed_once(monkeypatch):
    monkeypatch.setattr(flags, "programs", lambda: [("one", "First."), ("two", "Second.")])
    monkeypatch.setattr(flags, "classes_of", lambda name: [Own] if name == "one" else [Shared])
    assert [line for line in flags.markdown().splitlines() if line] == [
        "### one", "First.",
        "`Shared`:", "| flag | meaning | default |", "|---|---|---|",
        "| `--steps` | steps, 100 % of them; at least 1 | 5 |",
        "`Own`:", "| flag | meaning | default |", "|---|---|---|",
        "| `--steps` | steps; at least 1 | 7 |",
        r"| `--kind` | a or b\* (a, b) | none |",
        "| `--zero` | what replicas share (0, 1) | 1 |",
        "### two", "Second.", "And the flags of `Shared`, above."]


def test_a_flag_is_shown_again_where_the_default_preset_changes_it():
    assert flags.rows(WithPresets)[2:] == [
        "| `--steps` | steps, 100 % of them; at least 1 | 5; tiny: 9 |"]
    assert any(line.endswith("| 0.95; tiny: 0.99 |") for line in flags.rows(TrainArgs))


def test_every_program_hands_its_settings_over():
    assert [cls.__name__ for cls in flags.classes_of("train")] == [
        "TrainArgs", "ModelArgs", "Layout"]
    assert [cls.__name__ for cls in flags.classes_of("lab.flags")] == ["FlagsArgs"]


def test_flags_are_written_between_the_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr("sys.argv", ["flags", "--page", str(page)])
    monkeypatch.setattr(flags, "markdown", lambda: "| `--steps` |")
    page.write_text(f"before\n{flags.BEGIN}old\n{flags.END}\nafter\n")
    flags.main()
    once = page.read_text()
    assert once == f"before\n{flags.BEGIN}\n| `--steps` |\n{flags.END}\nafter\n"
    flags.main()
    assert page.read_text() == once
    page.write_text("no marks\n")
    with pytest.raises(ValueError, match="page = .* is not valid"):
        flags.main()
    assert page.read_text() == "no marks\n"
    monkeypatch.setattr("sys.argv", ["flags", "--page", str(tmp_path / "none.md")])
    with pytest.raises(ValueError, match="page = .*none.md' is not valid: it must be a file"):
        flags.main()
