"""Windows are dealt to ranks in batches of one shape."""

import pytest
import torch

from minids.parallel.validation import dealt


@pytest.mark.parametrize("windows", [1, 5, 7, 8, 12])
def test_all_ranks_batches_have_equally_many_rows_and_count_each_window_once(windows):
    text = torch.arange(windows).unsqueeze(1)
    ranks = [list(dealt(text, 2, 3, rank, torch.device("cpu"))) for rank in range(3)]
    assert [[len(batch) for batch, _ in own] for own in ranks] == [
        [min(2, -(-(windows - start) // 3)) for start in range(0, windows, 6)]] * 3
    counted = [row for own in ranks for batch, count in own for row in batch[:count].flatten()]
    assert sorted(counted) == list(range(windows))
