"""The split is the same in every process and every version: these numbers are pinned."""

from minids.text.splits import held_out


def test_a_hash_decides_and_is_always_the_same():
    # Python's own hash would hold out others in each process.
    assert [n for n in range(100) if held_out(str(n).encode(), 10)] == [
        11, 46, 70, 74, 76, 78, 79, 81, 92]
    assert [n for n in range(200) if held_out(str(n).encode(), 20)] == [
        46, 70, 78, 79, 81, 121, 127]
