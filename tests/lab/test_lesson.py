"""An exercise's check tells a right answer from a wrong one, in words and without a traceback."""

import ctypes
import itertools
import os
import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import minids.model.moe
from minids import ModelArgs
from minids.lab import checker, lesson
from minids.lab.checker import PATIENCE
from minids.lab.lesson import problems, review, table
from minids.model.mla import MLA
from minids.model.moe import max_violation

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


def test_a_thread_that_is_stopped_says_nothing(capfd):
    def fills(x):
        time.sleep(1.6)
        return [len(bytes(10 ** 7)) for _ in itertools.count()]

    [told] = problems(fills, CASES[:1])
    assert checker.LATE in told or "MemoryError" in told
    time.sleep(0.5)
    assert capfd.readouterr().err == ""


def test_only_the_end_of_a_stopped_thread_is_kept_quiet():
    told = []
    for kind in (checker.Unfinished, ValueError):
        checker.quiet(SimpleNamespace(exc_type=kind),
                      tell=lambda ended: told.append(ended.exc_type))
    assert told == [ValueError]


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


def imports_inside(x):
    from minids.model.moe import max_violation
    return max_violation(x)


def uses_a_module(x):
    return lesson.same(x, 9) or minids.model.moe.max_violation(x)


def uses_a_name(x):
    return [max_violation(y) for y in [x]][0]


def uses_a_class(x):
    def inside():
        return MLA(x)
    return inside()


@pytest.mark.parametrize("answer, taken", [
    (imports_inside, "minids.model.moe"), (uses_a_module, "minids"), (uses_a_name, "max_violation"),
    (uses_a_class, "MLA")])
def test_an_answer_from_the_package_is_not_taken(answer, taken):
    assert problems(answer, CASES) == [f"{answer.__name__} takes {taken} from minids, which knows "
                                       "the answer: write it yourself"]


def test_settings_and_what_a_notebook_wrote_may_be_used():
    def answer(x):
        return square(x) if ModelArgs.preset("tiny").dim else table

    assert problems(answer, CASES) == problems(abs, [((-3,), 3, "")]) == []


def loops(x):
    """Never ends."""
    while True:
        x += 1


def sleeps(x):
    """Waits outside of Python's loop."""
    time.sleep(60)


def counts(x):
    """Never ends, and makes more and more."""
    return [number for number in itertools.count() if number < 0]


def clings(x):
    """Never ends, and catches what it can."""
    while True:
        try:
            x += 1
        except:  # noqa: E722
            x = 0


@pytest.fixture(params=[True, False], ids=["rehearsed", "alone"])
def rehearsed(request, monkeypatch):
    """With the copy that Linux can make, and as it is elsewhere."""
    if not request.param:
        monkeypatch.setattr(lesson, "rehearse", lambda check, cases: (0, ""))


@pytest.mark.parametrize("endless", [loops, sleeps, counts, clings])
def test_an_answer_that_never_ends_is_told_within_five_seconds(endless, rehearsed):
    start = time.monotonic()
    found = problems(endless, CASES)
    assert time.monotonic() - start < 5.0
    assert found == [f"{endless.__name__}(3) has not finished after 4 seconds: "
                     "does one of its loops never end?"]
    assert problems(square, CASES) == []


def test_an_endless_loop_is_stopped_not_left_behind(rehearsed):
    before = threading.active_count()
    assert problems(loops, CASES)
    assert threading.active_count() == before


def sums(x):
    """Never ends, inside of a built-in that lets no other thread run."""
    return sum(iter(int, 1))


def backtracks(x):
    """Ends after some centuries."""
    return re.match(r"(a+)+$", "a" * 60 + "b")


def crashes(x):
    """Reads memory that is not there."""
    ctypes.string_at(0)


def doubles(x):
    """Takes more and more memory."""
    numbers = [x]
    while True:
        numbers += numbers


def fills(x):
    """The same in torch, whose error is another one."""
    return [torch.ones(10 ** 8) for _ in itertools.count()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
@pytest.mark.parametrize("answer, fate", [
    (sums, checker.LATE), (backtracks, checker.LATE), (doubles, checker.LARGE),
    (fills, checker.LARGE), (crashes, checker.GONE), (lambda x: os._exit(0), checker.GONE)])
def test_what_no_thread_survives_is_told_within_five_seconds(answer, fate):
    start, threads = time.monotonic(), threading.active_count()
    assert problems(answer, [(([],), [], ""), *CASES]) == [f"{answer.__name__}([]) {fate}"]
    assert time.monotonic() - start < 5.0 and threading.active_count() == threads


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
def test_the_case_that_no_thread_survives_is_named():
    def answer(x):
        return x * x if x != 0.1 else os.abort()

    assert problems(answer, CASES) == [f"answer(0.1) {checker.GONE}"]
    many = [((i,), i * i, "") for i in range(300)]
    assert problems(answer, [*many, CASES[1]]) == [f"answer(0.1) {checker.GONE}"]


def test_the_rehearsal_leaves_no_trace(capfd):
    """What an answer prints, counts or draws is done once, in this process."""
    calls = []

    def answer(x):
        print("here")
        calls.append(torch.rand(()).item())
        return x * x

    torch.manual_seed(0)
    assert problems(answer, CASES) == []
    torch.manual_seed(0)
    assert calls == [torch.rand(()).item() for _ in CASES]
    assert capfd.readouterr().out == "here\n" * len(CASES)


def test_large_products_survive_the_fork():
    """OpenMP's threads are not copied: an answer that wants them must not wait for ever."""
    torch.set_num_threads(2)
    large = torch.ones(700, 700)
    assert (large @ large)[0, 0] == 700
    assert problems(lambda x: (x @ x)[0, 0].item(), [((large,), 700.0, "")]) == []


def test_no_right_answer_is_called_late():
    """A fork beside a thread that is just ending: one in a few hundred copies hung in MKL."""
    torch.set_num_threads(2)
    x = torch.ones(14, 24, dtype=torch.float64)
    assert (torch.ones(800, 800) @ torch.ones(800, 800))[0, 0] == 800
    torch.set_num_threads(1)
    for _ in range(200):
        assert problems(lambda x: (x @ x.T)[0, 0].item(), [((x,), 24.0, "")] * 3) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a copy of the process")
def test_a_copy_that_is_late_once_gets_another_chance(monkeypatch):
    watch, fates = checker.watch, iter([checker.LATE, None])
    monkeypatch.setattr(checker, "watch", lambda *given: watch(*given) or next(fates) or "")
    assert problems(square, CASES) == [] and next(fates, "none left") == "none left"


def test_all_cases_share_the_time():
    """Ten cases of a second each must not take ten seconds."""
    start = time.monotonic()
    found = problems(lambda x: time.sleep(1) or x, [((i,), i, "") for i in range(10)])
    assert PATIENCE <= time.monotonic() - start < 5.0 and "not finished" in found[-1]


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


class Endless:
    """Shows itself for ever."""

    def __repr__(self):
        while True:
            pass


class Broken:
    """Cannot be shown, measured or compared."""

    def __repr__(self):
        raise ValueError("no")

    __len__ = __eq__ = __hash__ = tolist = __repr__


@pytest.mark.parametrize("expected", [3, [3], ONES])
def test_an_answer_that_cannot_be_shown_is_told(expected, rehearsed):
    start = time.monotonic()
    [told] = problems(lambda: Endless(), [((), expected, "")])
    assert told == f"<lambda>() {checker.LATE}" and time.monotonic() - start < 5.0
    [told] = problems(lambda: Broken(), [((), expected, "")])
    assert told == "<lambda>() stops with ValueError: no"


def test_a_huge_answer_is_not_written_out():
    start = time.monotonic()
    assert problems(lambda: [0] * 10 ** 7, [((), 3, "hint")]) == [
        "<lambda>() gives a list of length 10000000 instead of 3: hint"]
    assert time.monotonic() - start < 2.0


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
