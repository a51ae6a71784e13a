"""The architecture. Read layers, rope, sparse_attention, mla, moe, mtp, transformer."""
