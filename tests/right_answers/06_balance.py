"""Right answers to the exercises of notebook 06, unlike the reference."""


def mean_max_vio(layers):
    """With torch, row by row."""
    import torch
    found = [torch.tensor(load, dtype=torch.float64) for load in layers]
    return torch.stack([load.max() / load.mean() - 1 for load in found]).mean().item()


def can_teach(loss):
    """Twenty small steps."""
    torch.manual_seed(0)
    scores = (torch.rand(40, 8).double() * torch.linspace(0.4, 1, 8)).requires_grad_()
    first = loss(scores)
    for _ in range(20):
        value = loss(scores)
        if not value.requires_grad:
            return False
        [slope] = torch.autograd.grad(value, scores, allow_unused=True)
        if slope is None or slope.norm() == 0:
            return False
        scores = (scores - 1e-3 * slope / slope.norm()).detach().requires_grad_()
    return bool(loss(scores) < first)


def batch_loss(scores, k):
    """By scatter."""
    s = scores.reshape(-1, scores.shape[-1])
    share = s / s.sum(-1, keepdim=True)
    chosen = torch.zeros_like(s).scatter(1, s.topk(k).indices, 1.0)
    return (chosen.mean(0) * s.shape[1] / k * share.mean(0)).sum()


def balanced_loss(main, scores, k, alpha):
    """All sequences at once, with one-hot counts."""
    n_tokens, n_experts = scores.shape[1:]
    best = torch.nn.functional.one_hot(scores.topk(k).indices, n_experts).sum((1, 2))
    share = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return main + alpha * (best * share * n_experts / (k * n_tokens)).sum(-1).mean()


def balanced_loss(main, scores, k, alpha):
    """With a loop and a running sum."""
    total = main
    for rows in scores:
        total = total + alpha * sequence_loss(rows, k) / scores.size(0)
    return total


def training_step(weight, bias, values, parts, k, lr, speed):
    """All parts joined, with an optimizer of torch."""
    u, target = (torch.cat(each) for each in zip(*parts, strict=True))
    new = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([new], lr=lr)
    chosen, shares = gate(u, new, bias, k)
    torch.nn.functional.mse_loss((shares * values[chosen]).sum(-1), target).backward()
    optimizer.step()
    load = chosen.flatten().bincount(minlength=len(values)).double()
    return new.detach(), bias + speed * (load.mean() - load).sign()


def training_step(weight, bias, values, parts, k, lr, speed):
    """Gradients that add up, part by part."""
    new = weight.clone().requires_grad_()
    count, load = 0, 0
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        ((shares * values[chosen]).sum(-1) - target).square().sum().backward()
        count += len(target)
        load = load + torch.nn.functional.one_hot(chosen, len(bias)).sum((0, 1))
    return weight - lr * new.grad / count, move(bias, load, speed)


def balanced_loss(main, scores, k, alpha):
    """Sequence by sequence, with counts from a list."""
    total = 0.0
    for one in scores:
        S, E = one.shape
        chosen = one.topk(k, dim=-1).indices.flatten().tolist()
        share = one / one.sum(1, keepdim=True)
        P = share.sum(0) / S
        total = total + sum(P[i] * chosen.count(i) * E / (k * S) for i in range(E))
    return main + alpha * total / len(scores)


def balanced_loss(main, scores, k, alpha):
    """One-hot visits under no_grad, one einsum over everything."""
    import torch
    import torch.nn.functional as F
    B, S, E = scores.shape
    with torch.no_grad():
        f = F.one_hot(scores.topk(k).indices, E).sum((1, 2)).to(scores.dtype) * (E / k / S)
    P = torch.einsum("bse,bs->be", scores, 1 / scores.sum(-1)) / S
    return main + alpha / B * torch.einsum("be,be->", f, P)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The gradient by hand, and plain loops for the loads."""
    import torch
    N = sum(u.shape[0] for u, _ in parts)
    grad, load = torch.zeros_like(weight), [0] * len(bias)
    for u, target in parts:
        for x, y in zip(u, target, strict=True):
            s = (weight @ x).sigmoid()
            top = (s + bias).topk(k).indices
            total = s[top].sum()
            out = (s[top] * values[top]).sum() / total
            for i in top.tolist():
                load[i] += 1
                slope = 2 * (out - y) / N * (values[i] - out) / total * s[i] * (1 - s[i])
                grad[i] += slope * x
    mean = sum(load) / len(load)
    moved = torch.tensor([(mean > c) - (mean < c) for c in load], dtype=bias.dtype)
    return weight - lr * grad, bias + speed * moved


def training_step(weight, bias, values, parts, k, lr, speed):
    """All parts joined, an optimizer of PyTorch, a dense matrix of weights."""
    import torch
    u, target = torch.cat([u for u, _ in parts]), torch.cat([t for _, t in parts])
    w = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([w], lr=lr)
    s = torch.sigmoid(u @ w.T)
    on = torch.zeros_like(s).scatter(1, (s + bias).topk(k, dim=1).indices, 1.0).detach()
    g = s * on / (s * on).sum(1, keepdim=True)
    torch.nn.functional.mse_loss(g @ values, target).backward()
    optimizer.step()
    load = on.sum(0)
    return w.detach(), bias + speed * torch.sign(load.mean() - load)
