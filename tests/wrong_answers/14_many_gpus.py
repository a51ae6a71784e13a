"""Wrong answers to the exercises of notebook 14; a docstring says what is wrong."""


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """Consecutive parts by rank: right for FSDP alone and for one group."""
    count = n_experts // fsdp
    return list(range(rank * count, (rank + 1) * count))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """The whole share, which FSDP does not cut again."""
    share = n_experts // expert_parallel
    place = rank % expert_parallel
    return list(range(place * share, (place + 1) * share))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """Every so many ranks form a group, not neighbours."""
    place, group = divmod(rank, fsdp // expert_parallel)
    count = n_experts // fsdp
    start = group * (n_experts // (fsdp // expert_parallel)) + place * count
    return list(range(start, start + count))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """Experts are dealt like cards: every fourth one to a rank."""
    return list(range(rank, n_experts, fsdp))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """Shares are right, but within a share every group takes the first part."""
    place, count = rank % expert_parallel, n_experts // fsdp
    start = place * (n_experts // expert_parallel)
    return list(range(start, start + count))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """The parts of a share are handed out from its end."""
    group, place = divmod(rank, expert_parallel)
    count, share = n_experts // fsdp, n_experts // expert_parallel
    start = (place + 1) * share - (group + 1) * count
    return list(range(start, start + count))


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """Only the first expert of the part."""
    group, place = divmod(rank, expert_parallel)
    return [place * (n_experts // expert_parallel) + group * (n_experts // fsdp)]


def one_f_one_b(rank, ranks, batches):
    """GPipe: all forward passes, then all backward passes."""
    return [f"F{n}" for n in range(batches)] + [f"B{n}" for n in range(batches)]


def one_f_one_b(rank, ranks, batches):
    """One forward pass too many at the start."""
    early = min(ranks - rank, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in range(batches - early, batches)]


def one_f_one_b(rank, ranks, batches):
    """As many passes ahead as there are ranks before it: the last rank waits, not the first."""
    early = min(rank, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in range(batches - early, batches)]


def one_f_one_b(rank, ranks, batches):
    """All ranks are as far ahead as the first one."""
    early = min(ranks - 1, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in range(batches - early, batches)]


def one_f_one_b(rank, ranks, batches):
    """With fewer micro-batches than ranks it runs some that do not exist."""
    early = ranks - 1 - rank
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in range(max(0, batches - early), batches)]


def one_f_one_b(rank, ranks, batches):
    """Backward passes in reverse, as through the layers of one model."""
    early = min(ranks - 1 - rank, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in reversed(range(batches - early, batches))]


def one_f_one_b(rank, ranks, batches):
    """The last backward passes are forgotten."""
    early = min(ranks - 1 - rank, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes


def moved_biases(biases, loads, speed):
    """The loads of rank 0 alone."""
    mean = sum(loads[0]) / len(loads[0])
    return [b + speed * ((n < mean) - (n > mean)) for b, n in zip(biases, loads[0], strict=True)]


def moved_biases(biases, loads, speed):
    """Ranks vote: the majority of their own signs decides."""
    votes = [0] * len(biases)
    for own in loads:
        mean = sum(own) / len(own)
        votes = [v + (n < mean) - (n > mean) for v, n in zip(votes, own, strict=True)]
    return [b + speed * ((v > 0) - (v < 0)) for b, v in zip(biases, votes, strict=True)]


def moved_biases(biases, loads, speed):
    """The mean of what each rank would do by itself."""
    moved = [0.0] * len(biases)
    for own in loads:
        mean = sum(own) / len(own)
        moved = [m + (n < mean) - (n > mean) for m, n in zip(moved, own, strict=True)]
    return [b + speed * m / len(loads) for b, m in zip(biases, moved, strict=True)]


def moved_biases(biases, loads, speed):
    """The wrong way: crowded experts get more."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b - speed * ((n < mean) - (n > mean)) for b, n in zip(biases, total, strict=True)]


def moved_biases(biases, loads, speed):
    """The sum of all ranks against the mean of one."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(loads[0]) / len(total)
    return [b + speed * ((n < mean) - (n > mean)) for b, n in zip(biases, total, strict=True)]


def moved_biases(biases, loads, speed):
    """An expert at the mean goes up."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b + (speed if n <= mean else -speed) for b, n in zip(biases, total, strict=True)]


def moved_biases(biases, loads, speed):
    """The step grows with the excess."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b + speed * (mean - n) / mean for b, n in zip(biases, total, strict=True)]


def same_on_any_ranks(gradients_of, u):
    """The names and shapes."""
    one, two = gradients_of([u]), gradients_of([*u.chunk(2)])
    return all(one[name].shape == two[name].shape for name in one)


def same_on_any_ranks(gradients_of, u):
    """One rank twice."""
    one, again = gradients_of([u]), gradients_of([u])
    return all(torch.allclose(one[name], again[name]) for name in one)


def same_on_any_ranks(gradients_of, u):
    """Only the gate and the shared experts."""
    one, four = gradients_of([u]), gradients_of([*u.chunk(4)])
    return all(torch.allclose(one[name], four[name]) for name in one
               if not name.startswith("experts."))


def same_on_any_ranks(gradients_of, u):
    """Only the routed experts."""
    one, many = gradients_of([u]), [gradients_of([*u.chunk(n)]) for n in (2, 4)]
    return all(torch.allclose(one[name], other[name]) for name in one for other in many
               if name.startswith("experts."))


def same_on_any_ranks(gradients_of, u):
    """The direction, which a wrong factor does not change."""
    one, many = gradients_of([u]), [gradients_of([*u.chunk(n)]) for n in (2, 4)]
    return all(torch.allclose(one[name] / one[name].norm(), other[name] / other[name].norm())
               for name in one for other in many)


def same_on_any_ranks(gradients_of, u):
    """The lengths, which experts in another order do not change."""
    one, many = gradients_of([u]), [gradients_of([*u.chunk(n)]) for n in (2, 4)]
    return all(torch.allclose(one[name].norm(), other[name].norm())
               for name in one for other in many)


def same_on_any_ranks(gradients_of, u):
    """Two ranks, and never four."""
    one, two = gradients_of([u]), gradients_of([*u.chunk(2)])
    return all(torch.allclose(one[name], two[name]) for name in one)


def same_on_any_ranks(gradients_of, u):
    """Four ranks, and never two."""
    one, four = gradients_of([u]), gradients_of([*u.chunk(4)])
    return all(torch.allclose(one[name], four[name]) for name in one)


def same_on_any_ranks(gradients_of, u):
    """Any one parameter is enough."""
    one, many = gradients_of([u]), [gradients_of([*u.chunk(n)]) for n in (2, 4)]
    return any(torch.allclose(one[name], other[name]) for name in one for other in many)


def same_on_any_ranks(gradients_of, u):
    """A tolerance as wide as a percent."""
    one, many = gradients_of([u]), [gradients_of([*u.chunk(n)]) for n in (2, 4)]
    return all(torch.allclose(one[name], other[name], rtol=0.01) for name in one
               for other in many)


def own_experts(rank, fsdp, expert_parallel, n_experts):
    """The groups' parts stand side by side before the shares are dealt out."""
    count = n_experts // fsdp
    return list(range(rank * count, (rank + 1) * count))


def one_f_one_b(rank, ranks, batches):
    """As many passes ahead as there are ranks before it."""
    early = min(rank, batches)
    passes = [f"F{n}" for n in range(early)]
    for n in range(early, batches):
        passes += [f"F{n}", f"B{n - early}"]
    return passes + [f"B{n}" for n in range(batches - early, batches)]


def moved_biases(biases, loads, speed):
    """The mean is rounded to a whole number."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(total) // len(total)
    return [b + speed * ((n < mean) - (n > mean)) for b, n in zip(biases, total, strict=True)]


def moved_biases(biases, loads, speed):
    """Right, and moves the caller's biases too."""
    total = [sum(column) for column in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    for e, n in enumerate(total):
        biases[e] += speed * ((n < mean) - (n > mean))
    return list(biases)


def same_on_any_ranks(gradients_of, u):
    """Two ranks are never tried."""
    one, many = gradients_of([u]), gradients_of(list(u.chunk(4)))
    return all(torch.allclose(many[name], one[name], rtol=1e-6, atol=1e-12) for name in one)


def same_on_any_ranks(gradients_of, u):
    """A thousandth is taken for rounding."""
    one = gradients_of([u])
    return all(torch.allclose(many[name], one[name], rtol=0.01, atol=1e-3) for ranks in (2, 4)
               for many in [gradients_of(list(u.chunk(ranks)))] for name in one)


def one_f_one_b(rank, ranks, batches):
    """Single digits."""
    warm = min(ranks - rank - 1, batches)
    row = [f"F{i}" for i in range(warm)]
    for i in range(batches - warm):
        row += [f"F{warm + i}", f"B{i}"]
    return [x[:2] for x in row + [f"B{i}" for i in range(batches - warm, batches)]]


def same_on_any_ranks(gradients_of, u):
    """Two against four, never one."""
    a, b = gradients_of(list(u.chunk(2))), gradients_of(list(u.chunk(4)))
    return all(torch.allclose(a[n], b[n]) for n in a)


def same_on_any_ranks(gradients_of, u):
    """Wants version_a's numbers."""
    a = version_a([u])
    return all(
        torch.allclose(a[n], b[n], rtol=1e-7, atol=1e-12)
        for b in (gradients_of(list(u.chunk(k))) for k in (1, 2, 4))
        for n in a
    )
