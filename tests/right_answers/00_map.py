"""Right answers to the exercises of notebook 00, unlike the reference."""


def nothing_idle(counter):
    """By subtraction, in whole numbers."""
    total, active = (round(n) for n in counter(all_awake))
    return not total - active


def gpus_for_weights(parameters, width, gpu_bytes):
    """By the rest."""
    gpus, rest = divmod(parameters * width, gpu_bytes)
    return gpus + (rest > 0)


def attention_numbers(a):
    """Term by term."""
    q = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    n = a.dim * q if a.q_lora_rank == 0 else a.q_lora_rank * (a.dim + q + 1)
    n += (a.kv_lora_rank + a.qk_rope_head_dim) * a.dim + a.kv_lora_rank
    n += a.n_heads * (a.qk_nope_head_dim + a.v_head_dim) * a.kv_lora_rank
    return n + a.dim * a.n_heads * a.v_head_dim
