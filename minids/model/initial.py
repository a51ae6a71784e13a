"""Initial weights (V3 section 4.2): matrices from a normal of init_std, norms one, biases zero.

A model of at most LARGE parameters is drawn from torch's generator, matrix after matrix: whoever
needs the last one must draw all before it. A larger one would keep a GPU of many waiting, for 671B
parameters an hour and more, so each ROWS rows of a matrix come from a generator of their own. Its
seed is a number drawn from torch's generator plus the number of the block in the model, so that no
two blocks are alike, ranks draw only the blocks that their shares touch, several at a time, and
get the bits that one process has.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch
from torch import Tensor

LARGE = 2 ** 31  # parameters
ROWS = 64  # of a block, or fewer at a matrix's end

Region = tuple[slice, ...]  # of a tensor, a slice for each of its dimensions


def initial_weights(shapes: dict[str, torch.Size], std: float, threads: int = 1
                    ) -> Iterator[tuple[str, Callable[[Region], Tensor]]]:
    """Yield each parameter's name, and a function that returns a region of its initial values.

    shapes: of all parameters of a model, in its order; threads: that draw a large one
    The values, on the CPU, are the same whatever regions are asked for.
    """
    large = sum(map(prod, shapes.values())) > LARGE
    seed = int(torch.randint(2 ** 32, ())) if large else 0
    with ThreadPoolExecutor(threads) as pool:
        for name, shape in shapes.items():
            if name.endswith(("norm.weight", "bias")):  # a bias of the indexer's LayerNorm
                constant = torch.full(shape, float(name.endswith("weight")))
                yield name, constant.__getitem__
            elif not large:
                yield name, torch.empty(shape).normal_(std=std).__getitem__
            else:
                matrix = Blocks(shape, std, seed)
                yield name, lambda region, matrix=matrix: matrix.read(region, pool)
                seed += matrix.count


class Blocks:
    """A matrix, or a stack of matrices, (.., r, c), whose blocks of rows are drawn apart.

    seed: of its first block; count: of its blocks
    """

    def __init__(self, shape: torch.Size, std: float, seed: int):
        self.shape, self.std, self.seed = shape, std, seed
        self.each = -(-shape[-2] // ROWS)  # blocks of a matrix
        self.count = prod(shape[:-2]) * self.each

    def draw(self, number: int) -> Tensor:
        """Return a block: (ROWS, c), or fewer rows at the end of a matrix."""
        rows = min(ROWS, self.shape[-2] - number % self.each * ROWS)
        # What torch draws on a CPU depends on the lower 32 bits of a seed alone.
        generator = torch.Generator().manual_seed((self.seed + number) % 2 ** 32)
        return torch.empty(rows, self.shape[-1]).normal_(std=self.std, generator=generator)

    def read(self, region: Region, pool: ThreadPoolExecutor) -> Tensor:
        """Return a region's values, of which the blocks that it touches are drawn."""
        *stack, rows, columns = (range(size)[cut] for size, cut in zip(self.shape, region,
                                                                       strict=True))
        values = torch.empty(*map(len, (*stack, rows, columns)))
        if not values.numel():
            return values
        parts = values.view(-1, len(rows), len(columns))

        def fill(place: tuple[int, int, int]) -> None:
            """Draw one block; place: in `parts`, of the matrix in the stack, in the matrix."""
            at, matrix, block = place
            first = block * ROWS
            start, end = max(rows.start, first), min(rows.stop, first + ROWS)
            drawn = self.draw(matrix * self.each + block)[start - first:end - first]
            parts[at, start - rows.start:end - rows.start] = drawn[:, region[-1]]

        blocks = range(rows.start // ROWS, -(-rows.stop // ROWS))
        matrices = enumerate(stack[0] if stack else [0])
        list(pool.map(fill, ((*place, block) for place in matrices for block in blocks)))
        return values
