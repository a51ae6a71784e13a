"""An exercise's check tells a right answer from a wrong one, in words and without a traceback."""

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from minids import ModelArgs
from minids.lab import compare
from minids.lab.lesson import drawn, grade, problems, review, table, watched

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
        "double(3) gives 6 instead of 9. This case is about: multiply the number by itself\n"
        "double(0.1) gives 0.2 instead of 0.01. This case is about: decimals count too\n", "")


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

    assert problems(answer, CASES[:1]) == ["answer(3) stops with Mute (line 2 of the function)"]


def test_the_verdict_is_heard_whatever_became_of_stdout(capsys):
    def mutes(x):
        sys.stdout = open(os.devnull, "w")
        return x * x

    review(mutes, CASES)
    assert capsys.readouterr().out == "mutes is right in 2 of 2 cases\n"


def test_an_error_in_the_learners_code_becomes_a_sentence():
    stop = ("broken(0.1) stops with IndexError: list index out of range "
            "(line 3 of the function)")
    assert problems(broken, CASES) == [stop]
    later = (3,), 8, "the next case is still tried"
    told = "broken(3) gives 9 instead of 8. This case is about: the next case is still tried"
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

    assert problems(leave, CASES[:1]) == [
        f"leave(3) stops with {error.__name__}: enough (line 2 of the function)"]


def test_nothing_returned_is_told():
    assert problems(lambda x: None, CASES[:1]) == [
        "<lambda>(3) gives None instead of 9 (does it return its result?). "
        "This case is about: multiply the number by itself"]


def takes(numbers):
    """Right, and empties its argument."""
    total = sum(numbers)
    del numbers[:]
    return total


def test_an_argument_that_was_changed_is_a_fault_and_spoils_no_case():
    cases = [(([1, 2],), 3, "three"), (([1, 2],), 3, "again")]
    assert problems(takes, cases) == 2 * [
        "takes([1, 2]) gives the right result, but changes its argument [1, 2]: work on a copy"]
    assert cases == [(([1, 2],), 3, "three"), (([1, 2],), 3, "again")]


def doubled(x):
    """Right, and in place."""
    return x.mul_(2)


def renamed(parts):
    """Right, and adds to what it was given."""
    parts["all"] = parts["a"] + parts["b"]
    return parts["all"]


@pytest.mark.parametrize("answer, given, expected", [
    (doubled, torch.ones(2), torch.full((2,), 2.0)), (renamed, {"a": 1, "b": 2}, 3),
    (lambda rows: rows[0].sort() or rows[0][0], [[2, 1]], 1),
    (lambda x: x.add_(1).sum().item(), torch.zeros(20), 20.0),
    (lambda x: x.requires_grad_().sum().item(), torch.ones(2), 2.0),
    (lambda x: x.sum().backward() or x.sum().item(), torch.ones(2, requires_grad=True), 2.0)])
def test_any_kind_of_argument_is_compared_afterwards(answer, given, expected):
    [told] = problems(answer, [((given,), expected, "")])
    assert "but changes its argument" in told
    assert problems(lambda x: expected, [((given,), expected, "")]) == []


def test_what_an_answer_makes_of_a_watched_tensor_is_bounded():
    cases = [((watched(torch.ones(3), 4, "makes nine of three"),), torch.tensor(3.0), "small")]
    assert problems(lambda x: x.sum(), cases) == []
    for large in (lambda x: (x[:, None] * x).sum() / 3, lambda x: torch.outer(x, x).mean() * 3):
        [told] = problems(large, cases)
        assert "stops with ValueError: makes nine of three" in told


def test_arguments_that_cannot_be_compared_were_not_changed():
    nan, anything = torch.tensor([float("nan")]), object()
    assert problems(lambda x, y, z: 1, [((nan, anything, square), 1, "")]) == []


ONES = torch.ones(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("answer, told", [
    (ONES + 1e-12, ""),
    (ONES + 1e-8, "1.00000001 instead of 1.0 at [0, 0]: is something rounded to FP32 on the way?"),
    (ONES.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.5, dtype=torch.float64)),
     "1.5 instead of 1.0 at [1, 2]."),
    (ONES.T, "shape (3, 2) instead of (2, 3)."),
    (ONES * float("nan"), "a tensor that contains NaN."),
    (2 * ONES.sum(), "shape () instead of (2, 3).")])
def test_a_tensor_has_a_shape_and_values(answer, told):
    found = problems(lambda: answer, [((), ONES, "hint")])
    assert found == ([f"<lambda>() gives {told} This case is about: hint"] if told else [])


@pytest.mark.parametrize("answer, told", [
    (ONES.float(), "torch.float32 instead of torch.float64"),
    (ONES.tolist(), "[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]: only the type is wrong, a list instead of "
     "a tensor")])
def test_a_type_is_blamed_where_only_the_type_is_wrong(answer, told):
    assert problems(lambda: answer, [((), ONES, "hint")]) == [f"<lambda>() gives {told}"]


def test_a_gradient_that_was_cut_off_is_told():
    wanted = torch.ones(2, requires_grad=True) * 2
    assert problems(lambda: torch.full((2,), 2.0), [((), wanted, "hint")]) == [
        "<lambda>() gives the right numbers in a tensor without a gradient"]
    x = torch.ones(2, requires_grad=True)
    assert problems(lambda x: x * 2, [((x,), wanted, "hint")]) == []


def test_single_precision_is_enough_for_single_precision():
    assert problems(lambda: ONES.float() + 1e-6, [((), ONES.float(), "")]) == []


@pytest.mark.parametrize("answer, expected, told", [
    (35136.0, 35_136, "35136.0: only the type is wrong, a float instead of an int"),
    ((0, 0, 1), [0, 0, 1], "(0, 0, 1): only the type is wrong, a tuple instead of a list"),
    (range(3), [0, 1, 2], "range(0, 3): only the type is wrong, a range instead of a list"),
    ([1.0, 2.0], [1, 2], "[1.0, 2.0]: only the type is wrong, a float instead of an int; at [0]"),
    (0, False, "0: only the type is wrong, an int instead of a bool"),
    ({0: 1.0}, {0: 1}, "{0: 1.0}: only the type is wrong, a float instead of an int; at [0]")])
def test_only_a_type_is_wrong(answer, expected, told):
    assert problems(lambda: answer, [((), expected, "the idea")]) == [f"<lambda>() gives {told}"]


def test_an_answer_that_looks_at_its_caller_gets_none():
    """The caller holds the expected result in a variable."""
    def frames(x):
        import sys
        return sys._getframe(1).f_locals["expected"]

    def nested(x):
        def caller():
            import inspect
            return inspect.stack()[2].frame.f_locals
        return caller()["expected"]

    def memory(x):
        import gc
        return next(each[1] for each in gc.get_objects() if type(each) is tuple and x in each)

    for answer, means in (frames, "_getframe"), (nested, "inspect"), (memory, "gc"):
        [told] = problems(answer, [((3,), 9, "square it")])
        assert told.startswith(f"{answer.__name__} looks at its caller by ") and (
            means in told or "f_locals" in told)


def test_large_whole_numbers_must_be_equal():
    """Not as floats, which are equal in six digits: no type is to blame."""
    assert problems(lambda: 10 ** 12 + 1, [((), 10 ** 12, "exactly")]) == [
        "<lambda>() gives 1_000_000_000_001 instead of 1_000_000_000_000. This case is about: "
        "exactly"]


def test_a_whole_number_that_no_float_holds_is_a_number_all_the_same():
    [told] = problems(lambda: 2 ** 1024 - 1, [((), 1.0, "")])
    assert told == "<lambda>() gives int instead of 1.0"


def test_the_first_difference_of_long_lists_is_named():
    wanted = [False] * 4 + [True] * 30
    assert problems(lambda: [True] * 34, [((), wanted, "hint")]) == [
        "<lambda>() gives a list of length 34; at [0] it has True instead of False. "
        "This case is about: hint"]
    ramp = [i / 8 for i in range(40)]
    off = [*ramp[:9], ramp[9] + 0.001, *ramp[10:]]
    assert "; at [9] it has 1.126 instead of 1.125" in problems(
        lambda: off, [((), ramp, "")])[0]
    rows = [[0] * 40, [1] * 40]
    assert "; at [1][39] it has 2 instead of 1" in problems(
        lambda: [rows[0], [*rows[1][:39], 2]], [((), rows, "")])[0]


def test_numbers_can_be_pasted():
    x = torch.tensor([[[1., 1.], [2., 1.]]])
    [told] = problems(lambda *_: 1, [((278_528, 0.1 - 0.01 + 0.01, x, 16), 2, "")])
    assert told == ("<lambda>(278_528, 0.1, torch.tensor([[[1.0, 1.0], [2.0, 1.0]]]), 16) "
                    "gives 1 instead of 2")
    assert problems(lambda: 0.1 + 1e-5, [((), 0.1, "")]) == [
        "<lambda>() gives 0.10001 instead of 0.1"]
    assert problems(lambda: 123456.7, [((), 123456.9, "")]) == [
        "<lambda>() gives 123456.7 instead of 123456.9"]


@pytest.mark.parametrize("args, told", [
    (ModelArgs.preset("v3"), "ModelArgs.preset('v3')"),
    (replace(ModelArgs.preset("tiny"), v_head_dim=24),
     "replace(ModelArgs.preset('tiny'), v_head_dim=24)")])
def test_settings_are_named_by_their_preset(args, told):
    assert problems(lambda a: 0, [((args,), 1, "")]) == [f"<lambda>({told}) gives 0 instead of 1"]


def test_a_property_is_told_what_it_misjudged():
    found = problems(lambda version: version is double, [((square,), True, "it squares"),
                                                         ((double,), False, "it doubles")])
    assert found == [
        "<lambda>(square) gives False instead of True: square is right, and the property refuses "
        "it (it squares)", "<lambda>(double) gives True instead of False: double is wrong, and the "
        "property lets it pass (it doubles)"]


def test_a_version_without_a_name_is_called_this_version():
    assert problems(square, [((lambda: 1,), True, "")])[0].endswith(
        "this version is right, so return True")


def test_a_property_that_stops_is_told_what_to_return():
    found = problems(lambda version: version([]), [((square,), False, "it squares")])
    assert found[0].endswith(": square is wrong, so return False (it squares)")


def test_a_known_mistake_is_named_and_no_other_hint(monkeypatch):
    table = {compare.digest("double", ["6", "0.2"]): "It doubles."}
    monkeypatch.setattr(compare, "mistakes", lambda: table)
    assert problems(double, CASES) == [
        "double(3) gives 6 instead of 9", "double(0.1) gives 0.2 instead of 0.01",
        "This is a known mistake: It doubles."]
    assert problems(square, CASES) == []
    assert "This case is about" in problems(broken, [CASES[1]])[0] + problems(double, CASES[:1])[0]


def test_a_grade_raises_the_sentences():
    grade(square, CASES)
    with pytest.raises(AssertionError, match="^double.3. gives 6 .*\ndouble.0.1. gives 0.2 "):
        grade(double, CASES)


def test_drawn_cases_are_the_same_each_time():
    def pair(dice):
        return dice.randrange(9), [dice.random()]

    cases = drawn(lambda n, row: row.pop() * n, pair, "hint", 5)
    assert cases == drawn(lambda n, row: row.pop() * n, pair, "hint", 5) and len(cases) == 5
    assert all(expected == n * row[0] for (n, row), expected, _ in cases)


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
    assert problems(lambda: [0] * 10 ** 7, [((), 3, "hint")]) == [
        "<lambda>() gives a list of length 10000000 instead of 3. This case is about: hint"]


@pytest.mark.parametrize("answer", [3, None, torch.nn.Identity()])
def test_what_is_no_function_is_told(answer):
    assert problems(answer, CASES) == [f"{answer!r} is not a function"]


def test_a_list_of_another_length_is_told():
    assert problems(lambda: [1], [((), [1, 2], "two")]) == [
        "<lambda>() gives [1], 1 entries instead of the 2 of [1, 2]. This case is about: two"]


def test_functions_are_named_and_large_tensors_by_shape():
    found = problems(lambda f, x: 0, [((square, torch.zeros(20, 5)), 1, "")])
    assert found == ["<lambda>(square, a tensor of shape (20, 5)) gives 0 instead of 1"]


@pytest.mark.parametrize("answer, told", [
    ("x" * 100, "a str of length 100"), ([10 ** 60], "[int]"), (10 ** 60, "int"), (set(), "set()"),
    ({torch.tensor(0): torch.tensor(0.6)}, "{torch.tensor(0): torch.tensor(0.6)}"),
    (torch.ones(30, 30), "a list of length 30"), (torch.ones(2), "[1.0, 1.0]"), ((1,), "(1,)"),
    ({1}, "{1}"), (b"a", "b'a'"), (10 ** 20 - 1, "99_999_999_999_999_999_999"), (10 ** 20, "int"),
    (1234.567, "1234.567"), (12345.678, "12345.7"), ("x" * 74, repr("x" * 74)),
    ("x" * 75, "a str of length 75"), ([1] * 25, str([1] * 25)), ([1] * 26, "a list of length 26")])
def test_values_are_shown_as_one_types_them_or_by_their_length(answer, told):
    assert problems(lambda: answer, [((), 7, "")]) == [f"<lambda>() gives {told} instead of 7"]


def test_a_table_puts_numbers_to_the_right():
    shown = table(["name", "size", "note"], [("a", 1234567, "7 of 8"), ("b", "", "0.2 KB")])
    assert shown.data.split("\n") == ["| name | size | note |", "| :-- | --: | :-- |",
                                      "| a | 1,234,567 | 7 of 8 |", "| b |  | 0.2 KB |"]
    right = table(["size", "share"], [(1, "7.5%"), (-22, "-0.2 KB")]).data.split("\n")
    assert right[1] == "| --: | --: |"


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        table(["a", "b"], [(1, 2), (3,)])
