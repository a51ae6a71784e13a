"""An exercise's check tells a right answer from a wrong one, in words and without a traceback."""

import numpy as np
import pytest
import torch

from minids.lesson import problems, review, table

CASES = [((3,), 9, "multiply the number by itself"), ((0.1,), 0.01, "decimals count too")]


def square(x):
    """Right."""
    return x * x


def double(x):
    """Wrong in both cases."""
    return 2 * x


def unwritten(x):
    """What nbgrader leaves of a solution."""
    raise NotImplementedError()


def broken(x):
    """Fails in the second case only."""
    return [9][int(x) != 3]


def test_a_right_answer_has_no_problem(capsys):
    assert problems(square, CASES) == []
    review(square, CASES)
    assert capsys.readouterr().out == "square is right in 2 of 2 cases\n"


def test_a_wrong_answer_is_named_with_the_call_the_result_and_the_hint(capsys):
    review(double, CASES)
    assert capsys.readouterr() == (
        "double(3) gives 6 instead of 9: multiply the number by itself\n"
        "double(0.1) gives 0.2 instead of 0.01: decimals count too\n", "")


def test_an_unwritten_function_is_said_once():
    assert problems(unwritten, CASES) == ["unwritten is not written yet"]


def test_an_error_in_the_learners_code_becomes_a_sentence():
    stop = "broken(0.1) stops with IndexError: list index out of range"
    assert problems(broken, CASES) == [stop]
    later = (3,), 8, "the next case is still tried"
    told = "broken(3) gives 9 instead of 8: the next case is still tried"
    assert problems(broken, [CASES[1], later]) == [stop, told]


@pytest.mark.parametrize("answer, right", [
    ([1, 2], True), (np.array([1, 2]), True), (torch.tensor([1, 2]), True),
    ((1, 2), False), ([1, 3], False), (np.array([2, 1]), False), (None, False)])
def test_a_list_may_come_as_an_array(answer, right):
    assert (problems(lambda: answer, [((), [1, 2], "")]) == []) is right


@pytest.mark.parametrize("answer, expected, right", [
    (0.1 + 0.2, 0.3, True), (0.3001, 0.3, False), (3, 3.0, True), (1, True, False),
    (9.0, 9, False), ("9", 9, False), (np.float64(0.3), 0.3, True), (float("nan"), 0.3, False)])
def test_floats_to_nine_digits_and_all_else_exactly(answer, expected, right):
    assert (problems(lambda: answer, [((), expected, "")]) == []) is right


def test_long_values_are_named_by_their_type():
    found = problems(lambda text: text, [(("x" * 100,), 7, "short")])
    assert found == ["<lambda>(str) gives str instead of 7: short"]


def test_a_table_puts_numbers_to_the_right():
    shown = table(["name", "size", "note"], [("a", 1234567, "7 of 8"), ("b", "", "0.2 KB")])
    assert shown.data.split("\n") == ["| name | size | note |", "| :-- | --: | :-- |",
                                      "| a | 1,234,567 | 7 of 8 |", "| b |  | 0.2 KB |"]
    right = table(["size", "share"], [(1, "7.5%"), (22, "0.2 KB")]).data.split("\n")
    assert right[1] == "| --: | --: |"


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        table(["a", "b"], [(1, 2), (3,)])
