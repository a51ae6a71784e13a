"""One CUDA graph per decoding step: its kernels are launched together, by one call.

A step of a small model is a thousand kernels of a few microseconds each, and Python needs longer to
launch them than the GPU to run them. A graph records the launches once and repeats them. It repeats
them as they were: with the same tensors at the same addresses, the same shapes and no question
asked of the GPU in between. So a step reads and writes tensors that stay where they are (newest
tokens, lengths, draws), and looks at a number of slots that is the same for a while: 256, 512, 1024
and so on, one graph for each.

The first step of each size runs without a graph. It compiles what has to be compiled; to capture
runs nothing, so the text goes on as if there were none.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from minids.base.command_line import say_once
from minids.kernels.registry import current_setting, mention

SMALLEST = 256  # slots; below it a step takes no longer than for fewer
ALMOST = 1.5  # where there is room for so many times a size, one graph serves both


def graphed(device: torch.device) -> bool:
    """Return whether decoding steps on this device become graphs: on a GPU, with bodies on."""
    return device.type == "cuda" and current_setting() == "auto"


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Leave garbage where it is: to destroy an old graph in it would spoil the one being made."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Steps:
    """Run a step again and again, on a GPU as graphs.

    step: called with a bound on the slots that any sequence has filled, at most `most`
    device: of the step's tensors; generator: of its draws
    """

    def __init__(self, step: Callable[[int], None], most: int, device: torch.device,
                 generator: torch.Generator | None = None):
        self.step, self.most, self.generator = step, most, generator
        self.graphed, self.captures = graphed(device), device.type == "cuda"
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.pool = None

    def __call__(self, longest: int) -> None:
        """Run the step; longest: slots that the longest sequence has filled."""
        if not self.graphed:
            mention("graphs.step", "launched")
            return self.step(longest)
        bound = SMALLEST
        while bound < longest:
            bound *= 2
        bound = self.most if self.most <= ALMOST * bound else bound
        if bound not in self.graphs:
            self.graphs[bound] = None
            return self.step(bound)
        if self.graphs[bound] is None and self.captures:
            self.graphs[bound] = self.capture(bound)
        if self.graphs[bound] is None:
            mention("graphs.step", "launched")
            return self.step(bound)
        mention("graphs.step", "replayed")
        self.graphs[bound].replay()

    def capture(self, bound: int) -> torch.cuda.CUDAGraph | None:
        """Record a step and return it, or None, and say so, where that cannot be done."""
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            with (uncollected(),
                  torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local")):
                self.step(bound)
            # To begin, a generator writes where a replay reads its offset, on a stream of its own:
            # late, on a busy GPU, and the first replay would draw from the beginning again.
            torch.cuda.synchronize()
        except Exception as error:  # whatever a body or a driver refuses: the step itself works
            self.captures = False
            say_once("decoding goes on without CUDA graphs, several times slower: "
                     + str(error).strip().partition("\n")[0])
            return None
        return graph
