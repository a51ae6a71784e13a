"""Right answers to the exercises of notebook 05, unlike the reference."""


def gate_weights(products, biases, k):
    """With torch, in FP64."""
    import torch
    score = torch.tensor(products, dtype=torch.float64).sigmoid()
    best = (score + torch.tensor(biases, dtype=torch.float64)).topk(k).indices
    return dict(zip(best.tolist(), (score[best] / score[best].sum()).tolist(), strict=True))


def groups_kept(choice, groups, kept):
    """With torch, in FP64."""
    import torch
    rows = torch.tensor(choice, dtype=torch.float64).view(groups, -1)
    return sorted(rows.topk(2).values.sum(1).topk(kept).indices.tolist())


def same_alone(layer_of, u):
    """Token by token, in FP64, up to a millionth."""
    together = layer_of(u)
    for i in range(len(u)):
        if (layer_of(u[i:i + 1])[0] - together[i]).abs().max() > 1e-6:
            return False
    return True


def routing_weights(scores, bias, groups, kept, k, scale):
    """Everything else at minus infinity, and a masked division."""
    choice = limit_groups(scores + bias, groups, kept)
    place = choice.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    picked = scores.where(place < k, 0.0)
    return scale * picked / picked.sum(-1, keepdim=True)


def routing_weights(scores, bias, groups, kept, k, scale):
    """Token by token, with gather and scatter."""
    found = []
    for row in scores:
        chosen = limit_groups((row + bias)[None], groups, kept)[0].topk(k).indices
        share = row[chosen] / row[chosen].sum() * scale
        found.append(torch.zeros_like(row).scatter(0, chosen, share))
    return torch.stack(found)


def sorted_by_expert(chosen, n_experts):
    """With torch's stable sort."""
    import torch
    flat = torch.tensor([i for row in chosen for i in row], dtype=torch.int64)
    token = torch.tensor([t for t, row in enumerate(chosen) for _ in row], dtype=torch.int64)
    order = flat.sort(stable=True).indices
    return token[order].tolist(), flat.bincount(minlength=n_experts).tolist()


def sorted_by_expert(chosen, n_experts):
    """A list of tokens for each expert."""
    rooms = {i: [] for i in range(n_experts)}
    for token, row in enumerate(chosen):
        for i in row:
            rooms[i].append(token)
    return [token for i in rooms for token in rooms[i]], [len(rooms[i]) for i in rooms]


def routed_experts(u, weights, w1, w2, w3):
    """Visit by visit."""
    y = [torch.zeros_like(x) for x in u]
    for token, i in weights.nonzero().tolist():
        x = u[token]
        gated = torch.nn.functional.silu(w1[i] @ x) * (w3[i] @ x)
        y[token] = y[token] + weights[token, i] * (w2[i] @ gated)
    return torch.stack(y)


def routed_experts(u, weights, w1, w2, w3):
    """Sorted by expert, then put back."""
    place, token = weights.T.nonzero(as_tuple=True)
    out = []
    for i in range(len(w1)):
        own = token[place == i]
        out.append(expert(u[own], w1[i], w2[i], w3[i]) * weights[own, i].unsqueeze(-1))
    return torch.zeros_like(u).index_add(0, token, torch.cat(out))


def routing_weights(scores, bias, groups, kept, k, scale):
    """Token by token, with Python's sort; the gradient goes through the stacked rows."""
    import torch
    rows, size = [], scores.shape[1] // groups
    for s in scores:
        c = (s + bias).tolist()
        by_group = [sum(sorted(c[g * size:(g + 1) * size])[-2:]) for g in range(groups)]
        good = sorted(range(groups), key=lambda g: -by_group[g])[:kept]
        legal = [e for e in range(len(c)) if e // size in good]
        best = sorted(legal, key=lambda e: -c[e])[:k]
        on = torch.zeros_like(s)
        on[best] = 1.0
        rows.append(scale * s * on / (s * on).sum())
    return torch.stack(rows)


def routing_weights(scores, bias, groups, kept, k, scale):
    """A mask of ones and zeros that multiplies; the notebook's own limit of groups."""
    import torch
    top = limit_groups(scores + bias, groups, kept).topk(k, dim=-1).indices
    part = scores * torch.zeros_like(scores).scatter_(1, top, 1.0)
    return part * (scale / part.sum(dim=1, keepdim=True))


def sorted_by_expert(chosen, n_experts):
    """One pass over the experts, with comprehensions."""
    lists = [[t for t, row in enumerate(chosen) if e in row] for e in range(n_experts)]
    return [t for one in lists for t in one], [len(one) for one in lists]


def sorted_by_expert(chosen, n_experts):
    """PyTorch's stable sort and bincount, returned as lists."""
    import torch
    flat = torch.tensor(chosen)
    order = flat.flatten().sort(stable=True).indices
    return (order // flat.size(1)).tolist(), flat.flatten().bincount(minlength=n_experts).tolist()


def routed_experts(u, weights, w1, w2, w3):
    """Each visit by itself."""
    import torch
    rows = []
    for t, x in enumerate(u):
        total = torch.zeros_like(x)
        for e in weights[t].nonzero().flatten().tolist():
            a, b = w1[e] @ x, w3[e] @ x
            total = total + weights[t, e] * (w2[e] @ (a * a.sigmoid() * b))
        rows.append(total)
    return torch.stack(rows)


def routed_experts(u, weights, w1, w2, w3):
    """The weight on the hidden numbers; masks of bools write the sum in place."""
    import torch
    import torch.nn.functional as F
    y = torch.zeros_like(u)
    for e in range(weights.size(1)):
        on = weights[:, e] != 0
        if on.sum():
            hidden = F.silu(F.linear(u[on], w1[e])) * F.linear(u[on], w3[e])
            y[on] += F.linear(hidden * weights[on, e].unsqueeze(1), w2[e])
    return y
