"""The one reader of JSONL files, each property beside the reader it replaces, which fails it."""

import json
import re
from functools import partial

import pytest

from minids.base.files import read_jsonl
from minids.sft import SftArgs, open_conversations


def old_reader(path):
    """Read in the user's encoding, split where str.splitlines does, keep all lines in memory."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        yield number, json.loads(line)


def keeps(reader, path) -> bool:
    try:
        return list(reader(path)) == EXPECTED[path.name]
    except ValueError:
        return False


FILES = {
    "separators.jsonl": '{"a": "x\u2028y"}\n"b\u0085c"\n"\u2029\x7f"\n'.encode(),
    "mark.jsonl": b'\xef\xbb\xbf{"a": 1}\n[2]\n',
    "blank.jsonl": b'1\n\n \t\r\n2\n\n',
}
EXPECTED = {
    "separators.jsonl": [(1, {"a": "x\u2028y"}), (2, "b\u0085c"), (3, "\u2029\x7f")],
    "mark.jsonl": [(1, {"a": 1}), (2, [2])],
    "blank.jsonl": [(1, 1), (4, 2)],
}


@pytest.mark.parametrize("name", FILES)
def test_separators_marks_and_blank_lines(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert keeps(partial(read_jsonl, skip_blank=True), path) and not keeps(old_reader, path)


@pytest.mark.parametrize("content, line, values", [
    (b"1\n\n2\n", 2, [1, 2]), (b"1\n2\n \t\r\n3\n", 3, [1, 2, 3]), (b"\n1\n", 1, [1]),
    (b"1\n\n", 2, [1]), (b"1\n ", 2, [1])])
def test_a_blank_line_is_refused_unless_skipped(content, line, values, tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_jsonl(path))
    assert str(error.value) == f"{path} line {line} is blank"
    assert [value for _, value in read_jsonl(path, skip_blank=True)] == values


def test_conversations_refuse_a_blank_line(tmp_path):
    path, row = tmp_path / "talk.jsonl", json.dumps({"messages": [
        dict(role="user", content="a"), dict(role="assistant", content="b")]})
    args = SftArgs(data=f"jsonl:{path}")
    path.write_text(f"{row}\n{row}\n")
    assert len(open_conversations(args)) == 2
    path.write_text(f"{row}\n\n{row}\n")
    with pytest.raises(ValueError, match=re.escape(f"not valid: {path} line 2 is blank")):
        open_conversations(args)


def test_the_last_line_needs_no_end_and_windows_ends_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "é"}\r\n{"a": "\\r\\n"}'.encode())
    assert list(read_jsonl(path)) == [(1, {"a": "é"}), (2, {"a": "\r\n"})]
    path.write_bytes(b"")
    assert list(read_jsonl(path)) == []


@pytest.mark.parametrize("line, reason", [
    (b'{"text": ', "is not JSON: "), (b'{"a": 1}\x85{"a": 2}', "is not UTF-8: "),
    (b"caf\xe9", "is not UTF-8: "), (b"[" * 100_000, "is not JSON: "),
    (b"9" * 5000, "is not JSON: "), (b'\xef\xbb\xbf{"a": 1}', "is not JSON: ")])
def test_an_error_names_file_and_line(line, reason, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        list(read_jsonl(path))
    assert str(error.value).startswith(f"{path} line 2 {reason}")
    with pytest.raises((ValueError, RecursionError)) as error:
        list(old_reader(path))
    assert str(path) not in str(error.value)


def test_a_file_is_read_as_it_is_asked_for(tmp_path):
    """The rows before a wrong line come first; the old reader decodes the whole file before."""
    path = tmp_path / "late.jsonl"
    path.write_bytes(b"1\n2\n\xff\n")
    rows = read_jsonl(path)
    assert [next(rows), next(rows)] == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="line 3 is not UTF-8"):
        next(rows)
    with pytest.raises(UnicodeDecodeError):
        next(old_reader(path))


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(OSError, match="none.jsonl"):
        next(read_jsonl(tmp_path / "none.jsonl"))
