"""A run of GRPO over many ranks: what its checkpoints hold in parts."""

from torch import Tensor

from minids.parallel.parts import Part
from minids.runs.over_ranks import OverRanks


class ReinforcerOverRanks(OverRanks):
    """The methods of a Reinforcer that many ranks do otherwise."""

    def more_state(self) -> dict:
        """Return nothing: the reference and the rollout are tensors, see below."""
        return {}

    def more_tensors(self) -> dict[str, dict[str, Tensor | Part]]:
        kinds = dict(reference=self.reference.state_dict())
        if self.in_use():
            kinds |= dict(rollout=self.batch.rollout.parts(self.args.updates, self.team))
        return kinds
