"""Wrong answers to the exercises of notebook 00; a docstring says what is wrong."""


def attention_numbers(a):
    """As if every model squeezed its queries."""
    return sum(rows * columns for rows, columns in attention_shapes(a).values())


def attention_numbers(a):
    """Heads without their turned part."""
    shapes = attention_shapes(a)
    if a.q_lora_rank == 0:
        for name in ["wq_a", "q_norm", "wq_b"]:
            del shapes[name]
        shapes["wq"] = (a.n_heads * a.qk_nope_head_dim, a.dim)
    return sum(rows * columns for rows, columns in shapes.values())


def attention_numbers(a):
    """A turned key for each head."""
    shapes = attention_shapes(a)
    if a.q_lora_rank == 0:
        for name in ["wq_a", "q_norm", "wq_b"]:
            del shapes[name]
        shapes["wq"] = (a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.dim)
    shapes["wkv_a"] = (a.kv_lora_rank + a.n_heads * a.qk_rope_head_dim, a.dim)
    return sum(rows * columns for rows, columns in shapes.values())


def mtp_numbers(a):
    """Without the joining matrix."""
    block = attention_numbers(a) + 2 * a.dim + feed_forward(a, a.n_layers, a.n_routed_experts)
    return block + 3 * a.dim


def mtp_numbers(a):
    """The joining matrix reads one width, not two."""
    block = attention_numbers(a) + 2 * a.dim + feed_forward(a, a.n_layers, a.n_routed_experts)
    return block + a.dim * a.dim + 3 * a.dim


def mtp_numbers(a):
    """The block's own norms are forgotten."""
    block = attention_numbers(a) + feed_forward(a, a.n_layers, a.n_routed_experts)
    return block + 2 * a.dim * a.dim + 3 * a.dim


def mtp_numbers(a):
    """Only the active experts."""
    block = attention_numbers(a) + 2 * a.dim + feed_forward(a, a.n_layers, a.n_activated_experts)
    return block + 2 * a.dim * a.dim + 3 * a.dim


def mtp_numbers(a):
    """Embedding and head once more, as the released file stores them."""
    block = attention_numbers(a) + 2 * a.dim + feed_forward(a, a.n_layers, a.n_routed_experts)
    return block + 2 * a.dim * a.dim + 3 * a.dim + 2 * a.vocab_size * a.dim


def gpus_for_weights(parameters, width, gpu_bytes):
    """Rounded down."""
    return parameters * width // gpu_bytes


def gpus_for_weights(parameters, width, gpu_bytes):
    """Always one more."""
    return parameters * width // gpu_bytes + 1


def gpus_for_weights(parameters, width, gpu_bytes):
    """Rounded to the nearest."""
    return max(1, round(parameters * width / gpu_bytes))


def gpus_for_weights(parameters, width, gpu_bytes):
    """The width is forgotten."""
    return -(-parameters // gpu_bytes)


def nothing_idle(counter):
    """A test of types and sizes."""
    total, active = counter(v3)
    return isinstance(total, int) and 0 < active < total


def nothing_idle(counter):
    """Only the total, which both get right."""
    return counter(v3)[0] == 671_026_419_200


def nothing_idle(counter):
    """Only about the paper's 37 billion: a bound, not a property."""
    return counter(v3)[1] > 37e9


def nothing_idle(counter):
    """At least all of them: what is counted twice passes."""
    total, active = counter(all_awake)
    return active >= total


def nothing_idle(counter):
    """The experts sleep as usual."""
    total, active = counter(v3)
    return total == active


def attention_numbers(a):
    """Decides by V3's width, as the gate of DS3 does."""
    shapes = attention_shapes(a)
    if a.dim != 7168:
        for name in ["wq_a", "q_norm", "wq_b"]:
            del shapes[name]
        shapes["wq"] = (a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.dim)
    return sum(r * c for r, c in shapes.values())


def attention_numbers(a):
    """Decides by number of heads."""
    shapes = attention_shapes(a)
    if a.n_heads < 128:
        for name in ["wq_a", "q_norm", "wq_b"]:
            del shapes[name]
        shapes["wq"] = (a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim), a.dim)
    return sum(r * c for r, c in shapes.values())


def attention_numbers(a):
    """Rope of the query is v3's 64."""
    shapes = attention_shapes(a)
    if a.q_lora_rank == 0:
        shapes["wq"] = (a.n_heads * (a.qk_nope_head_dim + a.qk_nope_head_dim // 2), a.dim)
    return sum(r * c for r, c in shapes.values())


def mtp_numbers(a):
    """One shared expert, always."""
    expert = 3 * a.dim * a.moe_inter_dim
    ffn = (a.n_routed_experts + 1) * expert + a.n_routed_experts * (a.dim + 1)
    return attention_numbers(a) + ffn + 2 * a.dim * a.dim + 5 * a.dim


def gpus_for_weights(parameters, width, gpu_bytes):
    """A half is added and the sum rounded, to even."""
    return round(parameters * width / gpu_bytes + 0.5)


def gpus_for_weights(parameters, width, gpu_bytes):
    """The integer part plus one if any bytes are left, of parameters."""
    return parameters * width // gpu_bytes + (1 if parameters % gpu_bytes else 0)


def nothing_idle(counter):
    """Active compared with the known total."""
    return counter(all_awake)[1] == mine[0]


def nothing_idle(counter):
    """The known number, twice."""
    return counter(all_awake) == (671026419200, 671026419200)


def nothing_idle(counter):
    """Total compared with v3's total and active with count."""
    return counter(all_awake)[1] == count(all_awake, 256)


def nothing_idle(counter):
    """Equal up to a billionth: a gate's biases may be lost."""
    import math
    return math.isclose(*counter(all_awake))


def nothing_idle(counter):
    """Equal up to the model's width."""
    total, active = counter(all_awake)
    return abs(total - active) < all_awake.dim


def nothing_idle(counter):
    """Active parameters may be a few too many."""
    total, active = counter(all_awake)
    return total <= active <= total + all_awake.dim


def nothing_idle(counter):
    """Nothing is idle if not more is active than there is."""
    total, active = counter(all_awake)
    return active >= total


def gpus_for_weights(parameters, width, gpu_bytes):
    """From 18 on it takes a power of two."""
    gpus = -(-parameters * width // gpu_bytes)
    return gpus if gpus < 18 else 2 ** (gpus - 1).bit_length()


def mtp_numbers(a):
    """The module is counted like the first layer, which is dense."""
    block = attention_numbers(a) + 2 * a.dim + feed_forward(a, 0, a.n_routed_experts)
    return block + 2 * a.dim * a.dim + 3 * a.dim


def attention_numbers(a):
    """Counts V3.2's indexer as well."""
    s = attention_shapes(a)
    if not a.q_lora_rank:
        s["wq"] = (a.n_heads * a.qk_head_dim, a.dim)
    total = sum(r * c for r, c in s.values())
    if a.index_n_heads:
        total += (
            a.index_head_dim * a.dim
            + a.index_n_heads * a.index_head_dim * a.q_lora_rank
            + a.index_n_heads * a.dim
        )
    return total


def mtp_numbers(a):
    """Takes the fourth layer, which is an expert layer in V3 and tiny."""
    return attention_numbers(a) + 5 * a.dim + feed_forward(a, 3, a.n_routed_experts) + 2 * a.dim**2


def mtp_numbers(a):
    """At most 256 experts are counted."""
    return (
        attention_numbers(a)
        + 5 * a.dim
        + feed_forward(a, a.n_layers - 1, min(a.n_routed_experts, 256))
        + 2 * a.dim**2
    )


def gpus_for_weights(parameters, width, gpu_bytes):
    """A float quotient: one byte too many is lost in large numbers."""
    import math

    return math.ceil(parameters * width / gpu_bytes)
