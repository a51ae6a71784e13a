"""Right answers to the exercises of notebook 14, unlike the reference."""


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """By cutting the list twice."""
    size, count = n_experts // expert_parallel, n_experts // fsdp
    experts = list(range(n_experts))
    share = experts[rank % expert_parallel * size:][:size]
    return share[rank // expert_parallel * count:][:count]


def same_on_any_ranks(gradients_of, u):
    """All of them up to a millionth."""
    one = gradients_of([u])
    for ranks in (1, 2, 4):
        found = gradients_of([*u.split(len(u) // ranks)])
        for name, gradient in one.items():
            if (found[name] - gradient).abs().max() > 1e-7 * gradient.abs().max():
                return False
    return True
