"""Fixtures of the tests of text; what only tokenizers need is imported when they ask for it."""

import json
from pathlib import Path

import pytest
from byte_tokens import write_rows


@pytest.fixture
def folder(tmp_path):
    """Write text in every format: 62 documents, two of them copies."""
    root = tmp_path / "texts"
    for i in range(20):
        (root / "deep").mkdir(parents=True, exist_ok=True)
        (root / "deep" / f"{i:02d}{('.txt', '.md', '.py')[i % 3]}").write_text(f"file {i}\n" * 3)
    rows = [json.dumps({"id": i, "content": f"line {i} é"}) for i in [*range(20), 3, 4]]
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    write_rows(root / "table.parquet", id=list(range(20)), body=[f"row {i}" for i in range(20)])
    (root / "ignored.bin").write_bytes(b"\0\1")
    (root / ".hidden.txt").write_text("hidden")
    return root


@pytest.fixture(scope="session")
def small():
    """Train 512 ids on three files of Python's library."""
    from tokenizer_checks import TEXTS, Tokenizer
    return Tokenizer.train(TEXTS, 512, corpus="three files")


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """Export the committed tokenizer for transformers."""
    from tokenizer_checks import COMMITTED
    folder = tmp_path_factory.mktemp("exported")
    COMMITTED.save_hf(folder)
    return folder
