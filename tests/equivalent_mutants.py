"""Mutants that no test can tell from the code, by reason: (file, line before, line after)."""

EQUIVALENT: dict[str, set[tuple[str, str, str]]] = {
}
