"""Configurations that the tests of `minids.costs` share."""

from dataclasses import replace

from minids import ModelArgs

NANO, TINY = ModelArgs.preset("nano"), ModelArgs.preset("tiny")
V2, V3, V32 = map(ModelArgs.preset, ("v2", "v3", "v3.2"))
# Small shapes that switch each choice on and off.
SHAPES = {
    "query latent": replace(NANO, q_lora_rank=24),
    "no gate bias": replace(NANO, gate_bias=False),
    "no shared expert": replace(NANO, n_shared_experts=0),
    "two shared experts": replace(NANO, n_shared_experts=2),
    "no dense layer": replace(NANO, n_dense_layers=0),
    "dense only": replace(NANO, n_routed_experts=0),
    "two MTP modules": replace(NANO, n_mtp_layers=2),
    "no MTP module": replace(NANO, n_mtp_layers=0),
    "uneven heads": replace(NANO, n_heads=3, v_head_dim=20, qk_rope_head_dim=12),
    "indexer": replace(NANO, index_n_heads=3, index_head_dim=24, index_topk=16, q_lora_rank=24),
    "indexer without query latent": replace(NANO, index_n_heads=3, index_head_dim=24),
}
