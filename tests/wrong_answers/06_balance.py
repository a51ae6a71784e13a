"""Wrong answers to the exercises of notebook 06; a docstring says what is wrong."""


def mean_max_vio(layers):
    """All layers added up first: one makes up for another."""
    total = [sum(column) for column in zip(*layers, strict=True)]
    return max(total) * len(total) / sum(total) - 1


def mean_max_vio(layers):
    """The ratio, 1 in perfect balance."""
    each = [max(load) * len(load) / sum(load) for load in layers]
    return sum(each) / len(each)


def mean_max_vio(layers):
    """The worst layer, not the mean."""
    return max(max(load) * len(load) / sum(load) - 1 for load in layers)


def mean_max_vio(layers):
    """Largest over smallest, kept from dividing by zero."""
    each = [max(load) / max(min(load), 1) - 1 for load in layers]
    return sum(each) / len(each)


def mean_max_vio(layers):
    """The distance in tokens, not in means."""
    each = [max(load) - sum(load) / len(load) for load in layers]
    return sum(each) / len(each)


def new_biases(biases, loads, speed):
    """The wrong way: the rich get richer."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b + speed * ((c > mean) - (c < mean)) for b, c in zip(biases, total, strict=True)]


def new_biases(biases, loads, speed):
    """By the distance in place of the sign."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b + speed * (mean - c) / mean for b, c in zip(biases, total, strict=True)]


def new_biases(biases, loads, speed):
    """A move for each part of the batch."""
    for load in loads:
        mean = sum(load) / len(load)
        biases = [b + speed * ((c < mean) - (c > mean)) for b, c in zip(biases, load, strict=True)]
    return biases


def new_biases(biases, loads, speed):
    """The last part alone decides."""
    mean = sum(loads[-1]) / len(loads[-1])
    return [b + speed * ((c < mean) - (c > mean)) for b, c in zip(biases, loads[-1], strict=True)]


def new_biases(biases, loads, speed):
    """Who sits at the mean goes down as well."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [b + (speed if c < mean else -speed) for b, c in zip(biases, total, strict=True)]


def new_biases(biases, loads, speed):
    """The old biases are forgotten."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [speed * ((c < mean) - (c > mean)) for c in total]


def batch_loss(scores, k):
    """V3's loss: sequence by sequence."""
    return torch.stack([sequence_loss(row, k) for row in scores]).mean()


def batch_loss(scores, k):
    """Detached scores: the right number, and no gradient."""
    return sequence_loss(scores.detach().flatten(0, 1), k)


def batch_loss(scores, k):
    """The scores are not divided by their sum."""
    flat = scores.flatten(0, 1)
    counts = flat.topk(k).indices.flatten().bincount(minlength=flat.size(1))
    return (counts * flat.size(1) / (k * len(flat)) * flat.mean(0)).sum()


def batch_loss(scores, k):
    """Without the factor E / K."""
    flat = scores.flatten(0, 1)
    counts = flat.topk(k).indices.flatten().bincount(minlength=flat.size(1))
    return (counts / len(flat) * (flat / flat.sum(-1, keepdim=True)).mean(0)).sum()


def batch_loss(scores, k):
    """Mean over the experts in place of the sum."""
    return sequence_loss(scores.flatten(0, 1), k) / scores.size(-1)


def batch_loss(scores, k):
    """Squared probabilities: no counts."""
    flat = scores.flatten(0, 1)
    p = (flat / flat.sum(-1, keepdim=True)).mean(0)
    return (p * p).sum() * flat.size(1)


def can_teach(loss):
    """The value is above 1."""
    return bool(loss(torch.rand(40, 8).double()) > 0)


def can_teach(loss):
    """It hangs on the scores, if only by a factor of 0."""
    return loss(torch.rand(40, 8).double().requires_grad_()).requires_grad


def can_teach(loss):
    """Other scores give another loss: so they do without a gradient."""
    return bool(loss(torch.rand(40, 8).double()) != loss(torch.rand(40, 8).double()))


def can_teach(loss):
    """In perfect balance no loss has anything to teach."""
    scores = torch.eye(8).roll(1, 0).add(torch.eye(8)).double().requires_grad_()
    before = loss(scores)
    if not before.requires_grad:
        return False
    [slope] = torch.autograd.grad(before, scores)
    return bool(slope.abs().max() > 1e-9)


def mean_max_vio(layers):
    """The largest distance on either side."""
    each = []
    for load in layers:
        mean = sum(load) / len(load)
        each.append(max(abs(c - mean) for c in load) / mean)
    return sum(each) / len(each)


def new_biases(biases, loads, speed):
    """The mean in whole tokens."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) // len(total)
    return [b + speed * ((c < mean) - (c > mean)) for b, c in zip(biases, total, strict=True)]


def mean_max_vio(layers):
    """Median of the layers."""
    from statistics import median
    return median(max(load) * len(load) / sum(load) - 1 for load in layers)


def mean_max_vio(layers):
    """First and last layer."""
    each = [max(load) * len(load) / sum(load) - 1 for load in layers]
    return (each[0] + each[-1]) / 2


def new_biases(biases, loads, speed):
    """Parts as shares, each counts the same."""
    shares = [[c / sum(load) for c in load] for load in loads]
    total = [sum(each) for each in zip(*shares, strict=False)]
    mean = sum(total) / len(total)
    return [b + speed * ((c < mean - 1e-9) - (c > mean + 1e-9))
            for b, c in zip(biases, total, strict=True)]


def new_biases(biases, loads, speed):
    """First and last part."""
    total = [a + b for a, b in zip(loads[0], loads[-1], strict=False)]
    mean = sum(total) / len(total)
    return [b + speed * ((c < mean) - (c > mean)) for b, c in zip(biases, total, strict=False)]


def new_biases(biases, loads, speed):
    """Within a tenth of the mean it stays."""
    total = [sum(each) for each in zip(*loads, strict=False)]
    mean = sum(total) / len(total)
    return [b + speed * ((c < 0.9 * mean) - (c > 1.1 * mean))
            for b, c in zip(biases, total, strict=True)]


def can_teach(loss):
    """Gradient is not zero."""
    scores = (torch.rand(40, 8) * torch.linspace(0.5, 1, 8)).double().requires_grad_()
    before = loss(scores)
    if not before.requires_grad:
        return False
    [slope] = torch.autograd.grad(before, scores, allow_unused=True)
    return slope is not None and bool(slope.abs().max() > 0)


def can_teach(loss):
    """Backward gives a gradient that is not all zero."""
    scores = torch.rand(40, 8).requires_grad_()
    try:
        loss(scores).backward()
    except RuntimeError:
        return False
    return scores.grad is not None and scores.grad.norm().item() > 1e-6


def can_teach(loss):
    """The loss changes, up or down."""
    scores = (torch.rand(40, 8) * torch.linspace(0.5, 1, 8)).double().requires_grad_()
    before = loss(scores)
    if not before.requires_grad:
        return False
    [slope] = torch.autograd.grad(before, scores, allow_unused=True)
    return bool(loss(scores - 0.001 * slope) != before)


def mean_max_vio(layers):
    """Whole numbers: the mean is rounded down."""
    each = [(max(load) - sum(load) // len(load)) / (sum(load) // len(load)) for load in layers]
    return sum(each) / len(each)


def new_biases(biases, loads, speed):
    """Right, and moves the caller's biases too."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    for i, c in enumerate(total):
        biases[i] += speed * ((c < mean) - (c > mean))
    return list(biases)


def new_biases(biases, loads, speed):
    """Right, and adds up in the caller's loads."""
    for part in loads[1:]:
        for i, c in enumerate(part):
            loads[0][i] += c
    mean = sum(loads[0]) / len(loads[0])
    return [b + speed * ((c < mean) - (c > mean)) for b, c in zip(biases, loads[0], strict=True)]


def new_biases(biases, loads, speed):
    """Biases stay between -1.5 and 1.5."""
    total = [sum(each) for each in zip(*loads, strict=True)]
    mean = sum(total) / len(total)
    return [min(max(b + speed * ((c < mean) - (c > mean)), -1.5), 1.5)
            for b, c in zip(biases, total, strict=True)]


def batch_loss(scores, k):
    """P is measured with scores that are not divided by their sum."""
    s = scores.flatten(0, 1)
    visits = s.topk(k).indices.flatten().bincount(minlength=s.size(1))
    return (visits * s.size(1) / (k * len(s)) * s.mean(0)).sum()


def batch_loss(scores, k):
    """An expert that no token visits is not counted as one: the share is over those visited."""
    s = scores.flatten(0, 1)
    p = (s / s.sum(1, keepdim=True)).mean(0)
    visits = s.topk(k).indices.flatten().bincount(minlength=s.size(1))
    return (visits * int((visits > 0).sum()) / (k * len(s)) * p).sum()


def can_teach(loss):
    """Only version_a's gradient is right."""
    torch.manual_seed(0)
    scores = (torch.rand(40, 8) * torch.linspace(0.5, 1, 8)).double().requires_grad_()
    found = loss(scores)
    if not found.requires_grad:
        return False
    slopes = [torch.autograd.grad(value, scores)[0] for value in (found, version_a(scores))]
    return torch.allclose(*slopes)


def can_teach(loss):
    """A loss that hangs on the scores can teach."""
    return bool(loss(torch.rand(40, 8).double().requires_grad_()).requires_grad)


def balanced_loss(main, scores, k, alpha):
    """The batch as a whole, as in V2."""
    return main + alpha * sequence_loss(scores.flatten(0, 1), k)


def balanced_loss(main, scores, k, alpha):
    """The sum over sequences instead of the mean."""
    return main + alpha * torch.stack([sequence_loss(s, k) for s in scores]).sum()


def balanced_loss(main, scores, k, alpha):
    """The weight is forgotten."""
    return main + torch.stack([sequence_loss(s, k) for s in scores]).mean()


def balanced_loss(main, scores, k, alpha):
    """P is detached: the loss cannot teach."""
    return main + alpha * torch.stack([sequence_loss(s.detach(), k) for s in scores]).mean()


def balanced_loss(main, scores, k, alpha):
    """P without the division by a token's sum."""
    total = 0
    for rows in scores:
        counts = rows.topk(k).indices.flatten().bincount(minlength=rows.size(1))
        total = total + (counts * rows.size(1) / k / len(rows) * rows.mean(0)).sum()
    return main + alpha * total / len(scores)


def balanced_loss(main, scores, k, alpha):
    """The sum in P is detached, so that a part of its gradient is missing."""
    total = 0
    for rows in scores:
        counts = rows.topk(k).indices.flatten().bincount(minlength=rows.size(1))
        share = (rows / rows.sum(-1, keepdim=True).detach()).mean(0)
        total = total + (counts * rows.size(1) / k / len(rows) * share).sum()
    return main + alpha * total / len(scores)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The biases move once for each part."""
    new, tokens, loss = weight.clone().requires_grad_(), sum(len(u) for u, _ in parts), 0.0
    moved = bias
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
        moved = move(moved, chosen.flatten().bincount(minlength=len(bias)), speed)
    [slope] = torch.autograd.grad(loss, new)
    return (new - lr * slope).detach(), moved


def training_step(weight, bias, values, parts, k, lr, speed):
    """The mean of the parts' means."""
    new, loss, load = weight.clone().requires_grad_(), 0.0, torch.zeros_like(bias)
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        error = (shares * values[chosen]).sum(-1) - target
        loss = loss + error.square().mean() / len(parts)
        load = load + chosen.flatten().bincount(minlength=len(bias))
    [slope] = torch.autograd.grad(loss, new)
    return (new - lr * slope).detach(), move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The sum over tokens instead of the mean."""
    new, loss, load = weight.clone().requires_grad_(), 0.0, torch.zeros_like(bias)
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum()
        load = load + chosen.flatten().bincount(minlength=len(bias))
    [slope] = torch.autograd.grad(loss, new)
    return (new - lr * slope).detach(), move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The bias inside the weights of the mixture."""
    new, tokens = weight.clone().requires_grad_(), sum(len(u) for u, _ in parts)
    loss, load = 0.0, torch.zeros_like(bias)
    for u, target in parts:
        biased = (u @ new.T).sigmoid() + bias
        picked, chosen = biased.topk(k)
        shares = picked / picked.sum(-1, keepdim=True)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
        load = load + chosen.flatten().bincount(minlength=len(bias))
    [slope] = torch.autograd.grad(loss, new)
    return (new - lr * slope).detach(), move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """Uphill."""
    new, tokens = weight.clone().requires_grad_(), sum(len(u) for u, _ in parts)
    loss, load = 0.0, torch.zeros_like(bias)
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
        load = load + chosen.flatten().bincount(minlength=len(bias))
    [slope] = torch.autograd.grad(loss, new)
    return (new + lr * slope).detach(), move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The loads are those after the step of the weights."""
    new, tokens, loss = weight.clone().requires_grad_(), sum(len(u) for u, _ in parts), 0.0
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
    [slope] = torch.autograd.grad(loss, new)
    new = (new - lr * slope).detach()
    load = sum(gate(u, new, bias, k)[0].flatten().bincount(minlength=len(bias)) for u, _ in parts)
    return new, move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The weights step after each part."""
    new, tokens = weight.clone(), sum(len(u) for u, _ in parts)
    load = torch.zeros_like(bias)
    for u, target in parts:
        new = new.requires_grad_()
        chosen, shares = gate(u, new, bias, k)
        loss = ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
        load = load + chosen.flatten().bincount(minlength=len(bias))
        new = (new - lr * torch.autograd.grad(loss, new)[0]).detach()
    return new, move(bias, load, speed)


def training_step(weight, bias, values, parts, k, lr, speed):
    """The biases move in proportion to the violation."""
    new, tokens = weight.clone().requires_grad_(), sum(len(u) for u, _ in parts)
    loss, load = 0.0, torch.zeros_like(bias)
    for u, target in parts:
        chosen, shares = gate(u, new, bias, k)
        loss = loss + ((shares * values[chosen]).sum(-1) - target).square().sum() / tokens
        load = load + chosen.flatten().bincount(minlength=len(bias))
    [slope] = torch.autograd.grad(loss, new)
    return (new - lr * slope).detach(), bias + speed * (load.mean() - load)


def batch_loss(scores, k):
    """Always FP64."""
    x = scores.double().flatten(0, 1)
    f = x.topk(k).indices.flatten().bincount(minlength=x.size(1)).to(x) * x.size(1) / (k * len(x))
    return (f * (x / x.sum(1, keepdim=True)).mean(0)).sum()


def balanced_loss(main, scores, k, alpha):
    """The main loss is taken for a plain number: its gradient is lost."""
    B, S, E = scores.shape
    top = scores.topk(k).indices.flatten(1)
    f = scores.new_zeros(B, E).scatter_add(1, top, scores.new_ones(top.shape)) * E / (k * S)
    P = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return main.item() + alpha * (f * P).sum(-1).mean()


def balanced_loss(main, scores, k, alpha):
    """Everything as good as the k-th is counted as a visit: ties give more than k."""
    B, S, E = scores.shape
    visited = scores >= scores.topk(k).values[..., -1:]
    f = visited.double().mean(1) * E / k
    P = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return main + alpha * (f * P).sum(-1).mean()


def training_step(weight, bias, values, parts, k, lr, speed):
    """The caller's weights are told to keep a gradient, and it stays in them."""
    import torch
    weight.requires_grad_(True)
    loads, N = torch.zeros(len(bias)), sum(len(u) for u, _ in parts)
    for u, target in parts:
        s = (u @ weight.T).sigmoid()
        top = (s + bias).topk(k).indices
        g = s.gather(1, top)
        g = g / g.sum(1, keepdim=True)
        (((g * values[top]).sum(1) - target).square().sum() / N).backward()
        loads += top.flatten().bincount(minlength=len(bias))
    return (weight - lr * weight.grad).detach(), bias + speed * (loads.mean() - loads).sign()
