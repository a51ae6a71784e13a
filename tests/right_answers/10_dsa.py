"""Right answers to the exercises of notebook 10, unlike the reference."""


def blind_to_future(choose):
    """Ten draws without a seed."""
    for _ in range(10):
        scores = torch.randn(12, 12)
        other = scores + torch.randn(12, 12).triu(1)
        if not torch.equal(choose(scores, 3), choose(other, 3)):
            return False
    return True


def blind_to_future(choose):
    """Sixteen draws of another size, the future far above and far below."""
    for shift in (1000.0, -1000.0, 1.0, -1.0) * 4:
        scores = torch.randn(10, 10)
        other = torch.where(torch.ones(10, 10).tril() > 0, scores, torch.randn(10, 10) + shift)
        if not torch.equal(choose(scores, 2), choose(other, 2)):
            return False
    return True


def chosen(scores, t, k):
    """A stable sort of torch."""
    import torch
    order = torch.tensor(scores[:t + 1], dtype=torch.float64).sort(descending=True, stable=True)
    return sorted(order.indices[:k].tolist())


def breaks_even(pair, index, k):
    """The smallest whole number above the quotient."""
    import math
    from fractions import Fraction
    return math.floor(Fraction(pair * k, pair - index)) + 1


def sparse_indexer_loss(weights, scores, mask):
    """By torch's own KL divergence."""
    target = torch.nn.functional.normalize(weights.detach().sum(0) * mask, p=1, dim=-1)
    log_q = torch.where(mask, scores, -torch.inf).log_softmax(-1)
    log_q = torch.where(mask, log_q, 0.0)
    return torch.nn.functional.kl_div(log_q, target, reduction="batchmean")


def sparse_indexer_loss(weights, scores, mask):
    """Row by row, over the selected alone."""
    rows = []
    for w, s, m in zip(weights.detach().mean(0), scores, mask, strict=True):
        p = w[m] / w[m].sum()
        rows.append((torch.xlogy(p, p) - p * s[m].log_softmax(0)).sum())
    return sum(rows) / len(rows)


def hadamard_rotated(x):
    """Butterflies in place of a matrix."""
    width, n = x.size(-1), 1
    while n < width:
        pairs = x.unflatten(-1, (-1, 2, n))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        n *= 2
    return x / width ** 0.5


def hadamard_rotated(x):
    """By Kronecker products."""
    two = torch.tensor([[1, 1], [1, -1]], dtype=x.dtype) / 2 ** 0.5
    matrix = torch.eye(1, dtype=x.dtype)
    for _ in range(x.size(-1).bit_length() - 1):
        matrix = torch.kron(two, matrix)
    return x @ matrix.T


def sparse_attention(q, key, v, index, k):
    """Token by token, gathering what was selected."""
    rows = []
    for t in range(len(q)):
        best = index[t, :t + 1].topk(min(k, t + 1)).indices
        p = torch.einsum("hd,shd->hs", q[t], key[best]).div(q.size(-1) ** 0.5).softmax(-1)
        rows.append(torch.einsum("hs,shd->hd", p, v[best]))
    return torch.stack(rows)


def sparse_attention(q, key, v, index, k):
    """By torch's own attention, with the mask."""
    mask = chosen_mask(index, min(k, index.size(1)))
    heads = [x.transpose(0, 1) for x in (q, key, v)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, mask).transpose(0, 1)


def sparse_indexer_loss(weights, scores, mask):
    """Row by row, on the selected numbers alone; xlogy knows that 0 log 0 is 0."""
    import torch
    losses = []
    for i in range(len(scores)):
        on = mask[i]
        p = weights[:, i, on].detach().mean(0)
        p = p / p.sum()
        losses.append((torch.xlogy(p, p) - p * scores[i, on].log_softmax(0)).sum())
    return torch.stack(losses).mean()


def sparse_indexer_loss(weights, scores, mask):
    """PyTorch's KL, with the smallest number for what is hidden."""
    import torch
    import torch.nn.functional as F
    with torch.no_grad():
        p = weights.sum(0).where(mask, torch.zeros((), dtype=weights.dtype))
        p /= p.sum(1, keepdim=True)
    hidden = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.kl_div(F.log_softmax(hidden, 1), p, reduction="batchmean")


def hadamard_rotated(x):
    """Butterflies on copies."""
    import torch
    n = x.shape[-1]
    y = x.reshape(-1, n)
    step = 1
    while step < n:
        y = y.view(-1, n // (2 * step), 2, step)
        y = torch.stack([y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]], 2).reshape(-1, n)
        step *= 2
    return (y / n ** 0.5).reshape(x.shape)


def hadamard_rotated(x):
    """Signs by the parity of the common bits."""
    import torch
    n = x.shape[-1]
    H = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
    return x @ H.to(x) * n ** -0.5


def sparse_attention(q, key, v, index, k):
    """Loops over tokens, Python's sort, PyTorch's attention."""
    import torch
    import torch.nn.functional as F
    rows = []
    for t in range(len(q)):
        best = sorted(range(t + 1), key=lambda j: (-index[t, j].item(), j))[:k]
        rows.append(F.scaled_dot_product_attention(
            q[t, :, None], key[best].transpose(0, 1), v[best].transpose(0, 1))[:, 0])
    return torch.stack(rows)


def sparse_attention(q, key, v, index, k):
    """Ranks instead of topk; minus infinity is added."""
    import torch
    S, H, d = q.shape
    future = torch.full((S, S), -torch.inf, dtype=q.dtype).triu(1)
    order = (index + future).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    block = future.masked_fill(rank >= k, -torch.inf)
    p = (torch.einsum("shd,thd->sht", q, key) / d ** 0.5 + block[:, None]).softmax(-1)
    return torch.einsum("sht,thd->shd", p, v)
