"""An exercise's check tells a right answer from a wrong one, in words and without a traceback."""

import os
import sys
import time

import numpy as np
import pytest
import torch

from minids.lab.lesson import problems, review, table

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


def test_an_error_of_torch_is_not_taken_for_an_empty_answer():
    """torch raises NotImplementedError too, for a type that a function does not know."""
    [told] = problems(lambda x: torch.arange(x).log_softmax(0), CASES[:1])
    assert told.startswith("<lambda>(3) stops with NotImplementedError: ")


def test_an_error_without_words_is_named():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def answer(x):
        raise Mute

    assert problems(answer, CASES[:1]) == ["answer(3) stops with Mute"]


def test_the_verdict_is_heard_whatever_became_of_stdout(capsys):
    def mutes(x):
        sys.stdout = open(os.devnull, "w")
        return x * x

    review(mutes, CASES)
    assert capsys.readouterr().out == "mutes is right in 2 of 2 cases\n"


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
    (0.1 + 0.2, 0.3, True), (0.300001, 0.3, False), (torch.tensor(0.3), 0.3, True),
    (3, 3.0, True), (1, True, False), (9.0, 9, False), ("9", 9, False),
    (np.float64(0.3), 0.3, True), (float("nan"), 0.3, False)])
def test_floats_to_six_digits_and_all_else_exactly(answer, expected, right):
    assert (problems(lambda: answer, [((), expected, "")]) == []) is right


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, RecursionError, OSError])
def test_whatever_is_raised_is_told(error):
    def leave(x):
        raise error("enough")

    assert problems(leave, CASES[:1]) == [f"leave(3) stops with {error.__name__}: enough"]


def test_nothing_returned_is_told():
    assert problems(lambda x: None, CASES[:1]) == [
        "<lambda>(3) gives None instead of 9 (does it return its result?): "
        "multiply the number by itself"]


def test_a_case_is_not_spoiled_by_a_function_that_changes_its_arguments():
    def empties(numbers):
        total = sum(numbers)
        numbers.clear()
        return total

    cases = [(([1, 2],), 3, "")]
    assert problems(empties, cases) == problems(empties, cases) == []


ONES = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("answer, told", [
    (ONES + 1e-7, ""),
    (ONES + 1e-4, "values that differ by up to 0.0001"),
    (ONES.T, "shape (3, 2) instead of (2, 3)"),
    (ONES.float(), "torch.float32 instead of torch.float64"),
    (ONES * float("nan"), "a tensor that contains NaN"),
    (ONES * 1.5, "values that differ by up to 0.5"),
    (ONES.tolist(), "[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]] instead of a tensor of shape (2, 3)")])
def test_a_tensor_has_a_shape_a_type_and_values(answer, told):
    found = problems(lambda: answer, [((), ONES, "hint")])
    assert found == ([f"<lambda>() gives {told}: hint"] if told else [])


class Yes:
    """Equal to everything."""

    def __eq__(self, other):
        return True


@pytest.mark.parametrize("answer, expected, right", [
    ([0.1 + 0.2], [0.3], True), ([[0.1 + 0.2], 1], [[0.3], 1], True), ([True], [1], False),
    ({"a": 0.1 + 0.2}, {"a": 0.3}, True), ({"a": 0.3, "b": 0}, {"a": 0.3}, False),
    ([(0, 1.0)], [(0, 1.0)], True), ([(0, 1.1)], [(0, 1.0)], False), ([1, 2, 3], [1, 2], False),
    (Yes(), 3, False), ([Yes()], [3], False), ([float("nan")], [0.5], False), ([2], [2.0], True)])
def test_nested_answers_are_compared_number_by_number(answer, expected, right):
    assert (problems(lambda: answer, [((), expected, "")]) == []) is right


def test_a_huge_answer_is_not_written_out():
    start = time.process_time()
    assert problems(lambda: [0] * 10 ** 7, [((), 3, "hint")]) == [
        "<lambda>() gives a list of length 10000000 instead of 3: hint"]
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("answer", [3, None, torch.nn.Identity()])
def test_what_is_no_function_is_told(answer):
    assert problems(answer, CASES) == [f"{answer!r} is not a function"]


def test_a_list_of_another_length_is_told():
    assert problems(lambda: [1], [((), [1, 2], "two")]) == [
        "<lambda>() gives [1], 1 entries instead of 2: two"]


def test_functions_are_named_and_tensors_by_shape():
    found = problems(lambda f, x: 0, [((square, torch.zeros(2, 5)), 1, "")])
    assert found == ["<lambda>(square, a tensor of shape (2, 5)) gives 0 instead of 1: "]


def test_long_values_are_named_by_their_length():
    found = problems(lambda text: text, [(("x" * 100,), 7, "short")])
    assert found == ["<lambda>(a str of length 100) gives a str of length 100 instead of 7: short"]
    for answer, told in [({torch.tensor(0): torch.tensor(0.6), torch.tensor(1): torch.tensor(0.4)},
                          "{tensor(0): tensor(0.6000), tensor(1): tensor(0.4000)}"),
                         ([10 ** 60], f"[{10 ** 55}..."),
                         (torch.ones(30, 30), "a tensor of shape (30, 30)"),
                         (torch.ones(2), "[1.0, 1.0]"), (10 ** 60, "int")]:
        assert problems(lambda answer=answer: answer, [((), 7, "")]) == [
            f"<lambda>() gives {told} instead of 7: "]


def test_a_table_puts_numbers_to_the_right():
    shown = table(["name", "size", "note"], [("a", 1234567, "7 of 8"), ("b", "", "0.2 KB")])
    assert shown.data.split("\n") == ["| name | size | note |", "| :-- | --: | :-- |",
                                      "| a | 1,234,567 | 7 of 8 |", "| b |  | 0.2 KB |"]
    right = table(["size", "share"], [(1, "7.5%"), (22, "0.2 KB")]).data.split("\n")
    assert right[1] == "| --: | --: |"


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        table(["a", "b"], [(1, 2), (3,)])
