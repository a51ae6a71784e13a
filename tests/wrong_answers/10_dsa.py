"""Wrong answers to the exercises of notebook 10; a docstring says what is wrong."""


def score(q, w, key):
    """No ReLU."""
    return float(sum(weight * sum(a * b for a, b in zip(head, key, strict=True))
                     for weight, head in zip(w, q, strict=True)))


def score(q, w, key):
    """The weight comes before the ReLU."""
    return float(sum(max(weight * sum(a * b for a, b in zip(head, key, strict=True)), 0.0)
                     for weight, head in zip(w, q, strict=True)))


def score(q, w, key):
    """The ReLU comes after the sum over the heads."""
    return max(float(sum(weight * sum(a * b for a, b in zip(head, key, strict=True))
                         for weight, head in zip(w, q, strict=True))), 0.0)


def score(q, w, key):
    """The products are divided by the root of the key's size, as in attention."""
    products = [sum(a * b for a, b in zip(head, key, strict=True)) for head in q]
    return sum(weight * max(product, 0.0) / len(key) ** 0.5
               for weight, product in zip(w, products, strict=True))


def score(q, w, key):
    """The mean over the heads in place of the sum."""
    products = [sum(a * b for a, b in zip(head, key, strict=True)) for head in q]
    return sum(weight * max(product, 0.0)
               for weight, product in zip(w, products, strict=True)) / len(w)


def score(q, w, key):
    """The weights go through a softmax."""
    import math
    products = [sum(a * b for a, b in zip(head, key, strict=True)) for head in q]
    return sum(math.exp(weight) * max(product, 0.0) for weight, product
               in zip(w, products, strict=True)) / sum(map(math.exp, w))


def score(q, w, key):
    """The best head counts, not all of them."""
    products = [sum(a * b for a, b in zip(head, key, strict=True)) for head in q]
    return float(max(weight * max(product, 0.0)
                     for weight, product in zip(w, products, strict=True)))


def score(q, w, key):
    """The ReLU is put on the key."""
    return float(sum(weight * sum(a * max(b, 0.0) for a, b in zip(head, key, strict=True))
                     for weight, head in zip(w, q, strict=True)))


def chosen(scores, t, k):
    """The best of all tokens: it sees the future."""
    return sorted(sorted(range(len(scores)), key=lambda s: -scores[s])[:k])


def chosen(scores, t, k):
    """Does not see itself."""
    return sorted(sorted(range(t), key=lambda s: -scores[s])[:k])


def chosen(scores, t, k):
    """The best of all tokens, those of the future struck out afterwards."""
    best = sorted(range(len(scores)), key=lambda s: -scores[s])[:k]
    return sorted(s for s in best if s <= t)


def chosen(scores, t, k):
    """The future's scores are set to 0, not to minus infinity."""
    masked = [score if s <= t else 0.0 for s, score in enumerate(scores)]
    return sorted(sorted(range(len(scores)), key=lambda s: -masked[s])[:min(k, t + 1)])


def chosen(scores, t, k):
    """The last ones, as in a sliding window."""
    return list(range(max(t + 1 - k, 0), t + 1))


def chosen(scores, t, k):
    """The largest absolute scores."""
    return sorted(sorted(range(t + 1), key=lambda s: -abs(scores[s]))[:k])


def chosen(scores, t, k):
    """The lowest scores."""
    return sorted(sorted(range(t + 1), key=lambda s: scores[s])[:k])


def breaks_even(pair, index, k):
    """The context where both cost the same counts already."""
    return -(-pair * k // (pair - index))


def breaks_even(pair, index, k):
    """The indexer is taken for free."""
    return k + 1


def breaks_even(pair, index, k):
    """The indexer reads only the tokens that are chosen."""
    return (pair + index) * k // pair + 1


def breaks_even(pair, index, k):
    """The indexer's cost is added where it is taken off."""
    return pair * k // (pair + index) + 1


def breaks_even(pair, index, k):
    """The causal half is counted on one side only."""
    return 2 * pair * k // (pair - index) + 1


def blind_to_future(choose):
    """Nobody attends to the future: but it may still decide."""
    return not choose(torch.randn(12, 12), 3).triu(1).any().item()


def blind_to_future(choose):
    """No more than k are chosen."""
    return bool(choose(torch.randn(12, 12), 3).sum(1).max() <= 3)


def blind_to_future(choose):
    """The last token, which has no future."""
    scores, other = torch.randn(2, 12, 12)
    other[-1] = scores[-1]
    return torch.equal(choose(scores, 3)[-1], choose(other, 3)[-1])


def blind_to_future(choose):
    """The same scores twice."""
    scores = torch.randn(12, 12)
    return torch.equal(choose(scores, 3), choose(scores.clone(), 3))


def blind_to_future(choose):
    """The past may not decide either."""
    scores, other = torch.randn(2, 12, 12)
    return torch.equal(choose(scores, 3), choose(other, 3))


def score(q, w, key):
    """Stops at the first head without a product."""
    s = 0.0
    for ww, h in zip(w, q, strict=False):
        p = sum(a * b for a, b in zip(h, key, strict=True))
        if p <= 0:
            break
        s += ww * p
    return s


def score(q, w, key):
    """Only the first two dims."""
    return float(sum(weight * max(head[0] * key[0] + head[1] * key[1], 0)
                     for weight, head in zip(w, q, strict=True)))


def chosen(scores, t, k):
    """Index(value): ties found twice."""
    best = sorted(scores[:t + 1], reverse=True)[:k]
    return sorted(scores.index(v) for v in best)


def chosen(scores, t, k):
    """Dict value to place."""
    at = {v: i for i, v in enumerate(scores)}
    best = sorted(scores[:t + 1], reverse=True)[:k]
    return sorted(at[v] for v in best)


def chosen(scores, t, k):
    """Threshold by >= k-th."""
    seen = scores[:t + 1]
    bar = sorted(seen)[-min(k, len(seen))]
    return [s for s in range(t + 1) if scores[s] >= bar]


def breaks_even(pair, index, k):
    """Exact: +1, otherwise rounded."""
    x = pair * k / (pair - index)
    return int(x) + 1 if x == int(x) else round(x)


def breaks_even(pair, index, k):
    """Ceil(x + 0.1)."""
    import math
    return math.ceil(pair * k / (pair - index) + 0.1)


def breaks_even(pair, index, k):
    """Int of a rounded quotient k / (1 - index / pair)."""
    return int(k / (1 - index / pair)) + 1


def blind_to_future(choose):
    """Triu(2): the next token is not changed."""
    torch.manual_seed(0)
    scores = torch.randn(12, 12)
    return torch.equal(choose(scores, 3), choose(scores + 5 * torch.randn(12, 12).triu(2), 3))


def blind_to_future(choose):
    """Only the last token's column is changed."""
    torch.manual_seed(0)
    scores = torch.randn(12, 12)
    other = scores.clone()
    other[:-1, -1] = torch.randn(11) * 10
    return torch.equal(choose(scores, 3), choose(other, 3))


def blind_to_future(choose):
    """Only two tokens (2x2), k=1."""
    s = torch.tensor([[0.0, -9.0], [0.0, 1.0]])
    o = torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    return torch.equal(choose(s, 1), choose(o, 1))


def chosen(scores, t, k):
    """Of equal scores any token wins: NumPy's sort is not stable."""
    import numpy
    return sorted(numpy.argsort(-numpy.array(scores[:t + 1]))[:k].tolist())


def chosen(scores, t, k):
    """Of equal scores any token wins: topk does not say which."""
    import torch
    return sorted(torch.tensor(scores[:t + 1]).topk(min(k, t + 1)).indices.tolist())


def chosen(scores, t, k):
    """Of equal scores any token wins: argsort without stable."""
    import torch
    return sorted(torch.tensor(scores[:t + 1]).argsort(descending=True)[:k].tolist())


def chosen(scores, t, k):
    """Of equal scores the later token wins."""
    return sorted(sorted(range(t + 1), key=lambda s: (-scores[s], -s))[:k])


def chosen(scores, t, k):
    """The scores are rounded to BF16."""
    import torch
    near = torch.tensor(scores[:t + 1]).bfloat16().tolist()
    return sorted(sorted(range(t + 1), key=lambda s: -near[s])[:k])


def chosen(scores, t, k):
    """Right, and strikes the future out of the caller's list."""
    for s in range(t + 1, len(scores)):
        scores[s] = float("-inf")
    return sorted(sorted(range(t + 1), key=lambda s: -scores[s])[:k])


def breaks_even(pair, index, k):
    """Rounded up a little too early."""
    import math
    return math.ceil(pair * k / (pair - index) + 0.01)


def blind_to_future(choose):
    """Nobody attends to the future: but it may decide."""
    mask = choose(torch.randn(12, 12), 3)
    return not mask.triu(1).any()


def sparse_indexer_loss(weights, scores, mask):
    """KL the other way round."""
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - p.clamp(min=1e-12).log()), 0.0).sum(-1).mean()


def sparse_indexer_loss(weights, scores, mask):
    """The target does not sum to 1 again."""
    p = weights.detach().mean(0) * mask
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum(-1).mean()


def sparse_indexer_loss(weights, scores, mask):
    """The indexer's softmax runs over all tokens."""
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum(-1).mean()


def sparse_indexer_loss(weights, scores, mask):
    """The first head alone."""
    p = weights.detach()[0] * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum(-1).mean()


def sparse_indexer_loss(weights, scores, mask):
    """The sum over tokens."""
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum()


def sparse_indexer_loss(weights, scores, mask):
    """Cross-entropy: the target's entropy is missing."""
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(p > 0, -p * log_q, 0.0).sum(-1).mean()


def sparse_indexer_loss(weights, scores, mask):
    """The gradient reaches attention's weights."""
    p = weights.sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    log_q = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0.0).sum(-1).mean()


def hadamard_rotated(x):
    """The root of the width is forgotten."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < x.size(-1):
        upper = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([upper, torch.cat([matrix, -matrix], dim=1)])
    return x @ matrix


def hadamard_rotated(x):
    """Divided by the width."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < x.size(-1):
        upper = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([upper, torch.cat([matrix, -matrix], dim=1)])
    return x @ matrix / x.size(-1)


def hadamard_rotated(x):
    """The minus stands in the upper right block."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while len(matrix) < x.size(-1):
        upper = torch.cat([matrix, -matrix], dim=1)
        matrix = torch.cat([upper, torch.cat([matrix, matrix], dim=1)])
    return x @ matrix / x.size(-1) ** 0.5


def hadamard_rotated(x):
    """Neighbours are added and subtracted, once."""
    if x.size(-1) == 1:
        return x
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a + b, a - b], dim=-1).flatten(-2) / 2 ** 0.5


def sparse_attention(q, key, v, index, k):
    """The future takes part in the selection."""
    best = index.topk(min(k, len(index))).indices
    mask = torch.zeros_like(index, dtype=torch.bool).scatter(1, best, True)
    mask = mask & (torch.ones_like(index).tril() > 0) | (torch.eye(len(index)) > 0)
    scores = torch.einsum("shd,thd->hst", q, key) / q.size(-1) ** 0.5
    return torch.einsum("hst,thd->shd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def sparse_attention(q, key, v, index, k):
    """What is not selected gets a score of 0."""
    mask = chosen_mask(index, min(k, len(index)))
    scores = torch.einsum("shd,thd->hst", q, key) / q.size(-1) ** 0.5
    return torch.einsum("hst,thd->shd", scores.masked_fill(~mask, 0.0).softmax(-1), v)


def sparse_attention(q, key, v, index, k):
    """The mask comes after the softmax, so that weights do not sum to 1."""
    mask = chosen_mask(index, min(k, len(index)))
    scores = torch.einsum("shd,thd->hst", q, key) / q.size(-1) ** 0.5
    p = scores.masked_fill(torch.ones_like(index).triu(1) > 0, -torch.inf).softmax(-1) * mask
    return torch.einsum("hst,thd->shd", p, v)


def sparse_attention(q, key, v, index, k):
    """The last k tokens, a window."""
    at = torch.arange(len(q))
    mask = (at <= at[:, None]) & (at > at[:, None] - k)
    scores = torch.einsum("shd,thd->hst", q, key) / q.size(-1) ** 0.5
    return torch.einsum("hst,thd->shd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def sparse_attention(q, key, v, index, k):
    """The indexer's scores as attention's."""
    mask = chosen_mask(index, min(k, len(index)))
    p = index.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("st,thd->shd", p, v)


def sparse_attention(q, key, v, index, k):
    """Dense attention."""
    scores = torch.einsum("shd,thd->hst", q, key) / q.size(-1) ** 0.5
    future = torch.ones_like(index).triu(1) > 0
    return torch.einsum("hst,thd->shd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def score(q, w, key):
    """Cut at 6, as in ReLU6."""
    products = [sum(a * b for a, b in zip(x, key, strict=True)) for x in q]
    return sum(v * min(6.0, max(0.0, p)) for v, p in zip(w, products, strict=True))


def chosen(scores, t, k):
    """Five digits."""
    return sorted(sorted(range(t + 1), key=lambda s: -round(scores[s], 5))[:k])


def breaks_even(pair, index, k):
    """Tries no more than ten thousand tokens."""
    for n in range(1, 10_001):
        if index * n + pair * k < pair * n:
            return n
    return 10_000


def blind_to_future(choose):
    """Looks at three rows, and the future only falls."""
    for _ in range(20):
        s = torch.randn(8, 8)
        if not torch.equal(choose(s, 3)[3:6], choose(s - 3 * torch.ones(8, 8).triu(1), 3)[3:6]):
            return False
    return True


def sparse_indexer_loss(weights, scores, mask):
    """A selected token with weight 0 makes 0 times minus infinity."""
    import torch
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    logq = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    return (p[mask] * (p[mask].log() - logq[mask])).sum() / len(scores)


def sparse_indexer_loss(weights, scores, mask):
    """Tokens that were not selected score -30, which quiet selected ones do not reach."""
    import torch
    p = weights.detach().sum(0) * mask
    p = p / p.sum(-1, keepdim=True)
    logq = scores.masked_fill(~mask, -30.0).log_softmax(-1)
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - logq), 0.0).sum(-1).mean()


def sparse_attention(q, key, v, index, k):
    """Everything as good as the k-th is seen: equal scores let more than k in."""
    import torch
    S = len(q)
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    hidden = index.masked_fill(~seen, -torch.inf)
    keep = (hidden >= hidden.topk(min(k, S)).values[:, -1:]) & seen
    s = torch.einsum("shd,thd->hst", q, key) / q.shape[-1] ** 0.5
    return torch.einsum("hst,thd->shd", s.masked_fill(~keep, -torch.inf).softmax(-1), v)


def sparse_attention(q, key, v, index, k):
    """What was not selected keeps a score of -30."""
    import torch
    S = len(q)
    seen = torch.ones(S, S, dtype=torch.bool).tril()
    top = index.masked_fill(~seen, -torch.inf).topk(min(k, S)).indices
    keep = torch.zeros(S, S, dtype=torch.bool).scatter(1, top, True) & seen
    s = torch.einsum("shd,thd->hst", q, key) / q.shape[-1] ** 0.5
    return torch.einsum("hst,thd->shd", s.masked_fill(~keep, -30.0).softmax(-1), v)
