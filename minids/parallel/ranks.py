"""The process group of a run, and the meshes that its messages travel through.

The same ranks form two meshes, which cover them in the same order:

    dense    (pipeline, replicate, fsdp)                 embedding, attention, shared experts, ..
    sparse   (pipeline, replicate, expert_fsdp, expert)  the routed experts

with expert_fsdp = fsdp / expert_parallel. Ranks of one `expert` group send each other tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minids.parallel.layout import Layout


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: their layout, their meshes, and the place of this one in them."""

    layout: Layout
    device: torch.device
    dense: DeviceMesh  # (pipeline, replicate, fsdp)
    sparse: DeviceMesh  # (pipeline, replicate, expert_fsdp, expert)

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Ranks":
        """Return the meshes of a fitted layout; all ranks call this, in a process group."""
        shape = layout.pipeline, layout.replicate
        assert math.prod(shape) * layout.fsdp == dist.get_world_size(), "a fitted layout"
        dense = init_device_mesh(device.type, (*shape, layout.fsdp),
                                 mesh_dim_names=("pipeline", "replicate", "fsdp"))
        sparse = init_device_mesh(
            device.type, (*shape, layout.expert_fsdp, layout.expert_parallel),
            mesh_dim_names=("pipeline", "replicate", "expert_fsdp", "expert"))
        return cls(layout, device, dense, sparse)

    def shards(self, experts: bool = False) -> DeviceMesh:
        """Return the mesh over which parameters are sharded and, if asked for, replicated."""
        mesh, name = (self.sparse, "expert_fsdp") if experts else (self.dense, "fsdp")
        return mesh["replicate", name] if self.layout.replicate > 1 else mesh[name]

    @property
    def data_rank(self) -> int:
        """Return which share of a batch this rank sees, among `layout.data_ranks`."""
        place = self.dense.get_local_rank
        return place("replicate") * self.layout.fsdp + place("fsdp")

    @property
    def memory(self) -> int:
        """Return the bytes of this rank's GPU; 0 on a CPU, whose memory ranks share."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else 0

    @property
    def pipeline_rank(self) -> int:
        """Return this rank's place in its pipeline."""
        return self.dense.get_local_rank("pipeline")
