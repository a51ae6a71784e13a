"""The order in which a pipeline's ranks work: what it stores meanwhile, and how long it waits.

The orders are torch's own tables. A forward pass takes one unit of time and a backward pass two, in
every stage, and messages take none: a bubble is what a schedule itself costs.
"""

from collections import Counter
from collections.abc import Iterator

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from minids.parallel.layout import Layout

UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}  # forward; backward, or its two halves: inputs, weights
Action = tuple[str, int, int]  # a key of UNITS, stage, micro-batch


def orders(layout: Layout) -> list[list[Action]]:
    """Return what each rank of a fitted layout's pipeline does in a step, in order."""
    if layout.pipeline == 1:
        return [[(kind, 0, n) for n in range(layout.micro_batches) for kind in "FB"]]
    table = get_schedule_ops(layout.schedule, layout.pipeline, layout.micro_batches,
                             layout.n_stages // layout.pipeline)
    return [list(actions(row)) for row in table]


def actions(row: list) -> Iterator[Action]:
    """Yield a rank's actions: DualPipe's pairs of a forward and a backward pass are two.

    A stage takes its micro-batches in order, and they are counted here: torch 2.13's table of 1F1B
    gives the last rank's forward passes the number of the next one.
    """
    counts = Counter()
    for one in (one for entry in row if entry for one in entry.sub_actions or [entry]):
        if (kind := one.computation_type.value) in UNITS:
            counted = "B" if kind == "I" else kind  # the half that others wait for
            yield kind, one.stage_index, counts[counted, one.stage_index]
            counts[counted, one.stage_index] += 1


def most_stored(order: list[Action], sizes: dict[int, int]) -> int:
    """Return the most that a rank stores at a time; sizes: of one micro-batch, by stage."""
    now = most = 0
    for kind, stage, _ in order:
        now += {"F": sizes[stage], "I": 0}.get(kind, -sizes[stage])
        most = max(most, now)
    return most


def bubble(rows: list[list[Action]]) -> float:
    """Return the share of a step in which ranks wait for each other; rows: of `orders`."""
    stages = 1 + max(stage for row in rows for _, stage, _ in row)
    done: dict[Action, int] = {}  # a pass whose result others wait for -> when it ends
    clocks, places = [0] * len(rows), [0] * len(rows)
    while any(place < len(row) for place, row in zip(places, rows, strict=True)):
        before = sum(places)
        for rank, row in enumerate(rows):
            while places[rank] < len(row):
                kind, stage, batch = row[places[rank]]
                way = "F" if kind == "F" else "B"
                source = stage - 1 if way == "F" else stage + 1
                waits = kind != "W" and 0 <= source < stages
                if waits and (way, source, batch) not in done:
                    break
                ready = done[way, source, batch] if waits else 0
                clocks[rank] = max(clocks[rank], ready) + UNITS[kind]
                if kind != "W":
                    done[way, stage, batch] = clocks[rank]
                places[rank] += 1
        assert sum(places) > before, "a schedule whose ranks all wait"
    work = sum(UNITS[kind] for row in rows for kind, _, _ in row)
    return 1 - work / (len(rows) * max(clocks))
