"""Wrong answers to the exercises of notebook 12; a docstring says what is wrong."""


def advantages_v32(rewards):
    """Over the standard deviation of the group, as GRPO had it first."""
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / len(group)) ** 0.5
        out.append([(r - mean) / (std + 1e-4) for r in group])
    return out


def advantages_v32(rewards):
    """Over the sample's standard deviation, as torch's `std` gives it."""
    out = []
    for group in rewards:
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        out.append([(r - mean) / (std + 1e-4) for r in group])
    return out


def advantages_v32(rewards):
    """Less the mean of the batch."""
    batch = [r for group in rewards for r in group]
    return [[r - sum(batch) / len(batch) for r in group] for group in rewards]


def advantages_v32(rewards):
    """The mean over the groups, along the wrong axis."""
    means = [sum(column) / len(column) for column in zip(*rewards, strict=True)]
    return [[r - mean for r, mean in zip(group, means, strict=True)] for group in rewards]


def advantages_v32(rewards):
    """Less the mean of the others, as in RLOO."""
    return [[r - (sum(group) - r) / (len(group) - 1) for r in group] for group in rewards]


def advantages_v32(rewards):
    """The rewards as they are."""
    return [list(group) for group in rewards]


def advantages_v32(rewards):
    """The group's mean, over the standard deviation of the batch."""
    batch = [r for group in rewards for r in group]
    mean = sum(batch) / len(batch)
    std = (sum((r - mean) ** 2 for r in batch) / len(batch)) ** 0.5
    return [[(r - sum(group) / len(group)) / std for r in group] for group in rewards]


def gain(ratio, advantage, low, high):
    """Clipped without the minimum: PPO's pessimism is lost."""
    return min(max(ratio, 1 - low), 1 + high) * advantage


def gain(ratio, advantage, low, high):
    """The larger of the two, as for a loss to bring down."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    return max(ratio * advantage, bounded * advantage)


def gain(ratio, advantage, low, high):
    """Not clipped."""
    return ratio * advantage


def gain(ratio, advantage, low, high):
    """`low` on both sides, as in PPO."""
    bounded = min(max(ratio, 1 - low), 1 + low)
    return min(ratio * advantage, bounded * advantage)


def gain(ratio, advantage, low, high):
    """`low` and `high` are swapped."""
    bounded = min(max(ratio, 1 - high), 1 + low)
    return min(ratio * advantage, bounded * advantage)


def gain(ratio, advantage, low, high):
    """Only from above: a bad reply is pushed down without an end."""
    return min(ratio * advantage, min(ratio, 1 + high) * advantage)


def gain(ratio, advantage, low, high):
    """The minimum of the ratios, before the advantage and its sign."""
    return min(ratio, min(max(ratio, 1 - low), 1 + high)) * advantage


def gain(ratio, advantage, low, high):
    """The product is clipped, not the ratio."""
    product = ratio * advantage
    return min(product, min(max(product, 1 - low), 1 + high))


def token_weight(length, lengths, how, longest):
    """Over the number of tokens, whatever is asked for."""
    return 1 / sum(lengths)


def token_weight(length, lengths, how, longest):
    """The number of replies is forgotten."""
    return {"sequence": 1 / length, "tokens": 1 / sum(lengths), "constant": 1 / longest}[how]


def token_weight(length, lengths, how, longest):
    """The longest reply of the batch for the longest one allowed."""
    count = len(lengths)
    return {"sequence": 1 / (count * length), "tokens": 1 / sum(lengths),
            "constant": 1 / (count * max(lengths))}[how]


def token_weight(length, lengths, how, longest):
    """The tokens' loss is divided by the number of replies once more."""
    count = len(lengths)
    return {"sequence": 1 / (count * length), "tokens": 1 / (count * sum(lengths)),
            "constant": 1 / (count * longest)}[how]


def token_weight(length, lengths, how, longest):
    """Padded: a reply's mean is taken over the longest of the batch."""
    count = len(lengths)
    return {"sequence": 1 / (count * max(lengths)), "tokens": 1 / sum(lengths),
            "constant": 1 / (count * longest)}[how]


def token_weight(length, lengths, how, longest):
    """Names swapped: every token counts in GRPO, every reply in DAPO."""
    count = len(lengths)
    return {"tokens": 1 / (count * length), "sequence": 1 / sum(lengths),
            "constant": 1 / (count * longest)}[how]


def groups_apart(advantages):
    """The advantages of a question add up to 0."""
    return bool(advantages(torch.rand(3, 5).double()).sum(1).abs().max() < 1e-9)


def groups_apart(advantages):
    """One question: no other group is there."""
    rewards = torch.rand(1, 5).double()
    return torch.allclose(advantages(rewards), advantages(rewards + 1))


def groups_apart(advantages):
    """All rewards rise alike, and the whole batch's mean and spread go along."""
    rewards = torch.rand(3, 5).double()
    return torch.allclose(advantages(rewards), advantages(rewards + 7))


def groups_apart(advantages):
    """Good replies lie above bad ones."""
    rewards = torch.rand(3, 5).double()
    return torch.equal(advantages(rewards).argsort(1), rewards.argsort(1))


def groups_apart(advantages):
    """The order of the questions does not matter."""
    rewards = torch.rand(3, 5).double()
    return torch.allclose(advantages(rewards).flip(0), advantages(rewards.flip(0)))


def advantages_v32(rewards):
    """Clamped to +-5."""
    return [[min(max(r - sum(g) / len(g), -5), 5) for r in g] for g in rewards]


def advantages_v32(rewards):
    """Rounded to two digits."""
    return [[round(r - sum(g) / len(g), 2) for r in g] for g in rewards]


def advantages_v32(rewards):
    """Negative rewards counted as 0."""
    return [[r - sum(max(x, 0) for x in g) / len(g) for r in g] for g in rewards]


def gain(ratio, advantage, low, high):
    """Dual clip c=10."""
    b = min(max(ratio, 1 - low), 1 + high)
    g = min(ratio * advantage, b * advantage)
    return max(g, 10 * advantage) if advantage < 0 else g


def gain(ratio, advantage, low, high):
    """Advantage bounded to +-2."""
    advantage = min(max(advantage, -2), 2)
    b = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, b * advantage)


def groups_apart(advantages):
    """The others shifted."""
    torch.manual_seed(0)
    r = torch.rand(3, 5).double()
    o = r.clone()
    o[1:] += 3
    return torch.allclose(advantages(r)[0], advantages(o)[0])


def groups_apart(advantages):
    """Others all equal: right or wrong."""
    r = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1]])
    o = r.clone()
    o[1] = 0
    return torch.allclose(advantages(r)[0], advantages(o)[0])


def groups_apart(advantages):
    """Compares with my_advantages by std."""
    r = torch.rand(3, 5).double()
    return any(torch.allclose(advantages(r), my_advantages(r, by_std=b)) for b in (True, False))


def advantages_v32(rewards):
    """Right, and writes into the caller's rewards."""
    for group in rewards:
        mean = sum(group) / len(group)
        for i, reward in enumerate(group):
            group[i] = reward - mean
    return [list(group) for group in rewards]


def gain(ratio, advantage, low, high):
    """A ratio above 30 is cut where the advantage is negative."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    return min(ratio, 30) * advantage if advantage < 0 and ratio > 30 else min(
        ratio * advantage, bounded * advantage)


def groups_apart(advantages):
    """Only the rewards of the first question change."""
    torch.manual_seed(0)
    rewards = torch.rand(3, 5, dtype=torch.float64)
    other = rewards.clone()
    other[0] = 3 * torch.rand(5)
    return torch.allclose(advantages(rewards)[1:], advantages(other)[1:])


def groups_apart(advantages):
    """Only the last question is looked at."""
    torch.manual_seed(0)
    rewards, other = torch.rand(2, 3, 5, dtype=torch.float64)
    other[2] = rewards[2]
    return torch.allclose(advantages(rewards)[2], advantages(3 * other - 2 * torch.where(
        torch.arange(3)[:, None] == 2, other, 0))[2])


def groups_apart(advantages):
    """Only the middle question is looked at."""
    torch.manual_seed(0)
    rewards, other = torch.rand(2, 3, 5, dtype=torch.float64)
    other = 3 * other
    other[1] = rewards[1]
    return torch.allclose(advantages(rewards)[1], advantages(other)[1])


def groups_apart(advantages):
    """Only the first reply of each question is looked at."""
    torch.manual_seed(0)
    rewards, found = torch.rand(3, 5, dtype=torch.float64), []
    for question in range(3):
        other = 3 * torch.rand(3, 5, dtype=torch.float64)
        other[question] = rewards[question]
        one, two = (advantages(x)[question, 0] for x in (rewards, other))
        found.append(torch.allclose(one, two))
    return all(found)


def groups_apart(advantages):
    """A tenth is taken for rounding."""
    torch.manual_seed(0)
    rewards, found = torch.rand(3, 5, dtype=torch.float64), []
    for question in range(3):
        other = rewards + 0.1 * torch.rand(3, 5, dtype=torch.float64)
        other[question] = rewards[question]
        one, two = (advantages(x)[question] for x in (rewards, other))
        found.append(torch.allclose(one, two, atol=0.1))
    return all(found)


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Without the minimum: a bad reply's ratio is clipped from above as well."""
    ratio, further = (logp - old_logp).exp(), ref_logp - logp
    gains = ratio.clamp(1 - low, 1 + high) * advantage
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    weight = torch.tensor(weight, dtype=logp.dtype)
    return -((gains - beta * (further.exp() - further - 1)) * weight).sum()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Every token weighs the same, whatever was asked for."""
    ratio, further = (logp - old_logp).exp(), ref_logp - logp
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -(gains - beta * (further.exp() - further - 1)).mean()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """k1 instead of k3."""
    ratio = (logp - old_logp).exp()
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    return -((gains - beta * (logp - ref_logp)) * torch.tensor(weight, dtype=logp.dtype)).sum()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """k3 the wrong way round."""
    ratio, further = (logp - old_logp).exp(), logp - ref_logp
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    weight = torch.tensor(weight, dtype=logp.dtype)
    return -((gains - beta * (further.exp() - further - 1)) * weight).sum()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """The KL is rewarded: its sign is wrong."""
    ratio, further = (logp - old_logp).exp(), ref_logp - logp
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    weight = torch.tensor(weight, dtype=logp.dtype)
    return -((gains + beta * (further.exp() - further - 1)) * weight).sum()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """The ratio carries no gradient."""
    ratio, further = (logp - old_logp).exp().detach(), ref_logp - logp
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    weight = torch.tensor(weight, dtype=logp.dtype)
    return -((gains - beta * (further.exp() - further - 1)) * weight).sum()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """The ratio upside down."""
    ratio, further = (old_logp - logp).exp(), ref_logp - logp
    gains = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    weight = [token_weight(n, lengths, how, longest) for n in lengths for _ in range(n)]
    weight = torch.tensor(weight, dtype=logp.dtype)
    return -((gains - beta * (further.exp() - further - 1)) * weight).sum()


def on_policy(logp, old_logp, advantage, lengths, delta):
    """Good replies are left out as well."""
    return sum(([drift.mean().item() <= delta] * len(drift)
                for drift in (old_logp - logp).split(lengths)), [])


def on_policy(logp, old_logp, advantage, lengths, delta):
    """Token by token, not the reply's mean."""
    kept = []
    for drift, a in zip((old_logp - logp).split(lengths), advantage.tolist(), strict=True):
        kept += [not (a < 0 and one > delta) for one in drift.tolist()]
    return kept


def on_policy(logp, old_logp, advantage, lengths, delta):
    """The sum over the reply's tokens."""
    kept = []
    for drift, a in zip((old_logp - logp).split(lengths), advantage.tolist(), strict=True):
        kept += [not (a < 0 and drift.sum().item() > delta)] * len(drift)
    return kept


def on_policy(logp, old_logp, advantage, lengths, delta):
    """Moved in either direction."""
    kept = []
    for drift, a in zip((old_logp - logp).split(lengths), advantage.tolist(), strict=True):
        kept += [not (a < 0 and abs(drift.mean().item()) > delta)] * len(drift)
    return kept


def on_policy(logp, old_logp, advantage, lengths, delta):
    """The ratio's logarithm the other way round."""
    kept = []
    for drift, a in zip((logp - old_logp).split(lengths), advantage.tolist(), strict=True):
        kept += [not (a < 0 and drift.mean().item() > delta)] * len(drift)
    return kept


def policy_step(logits, drawn_tokens, rewards, lr):
    """The mean of the whole batch as the yardstick."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(1, drawn_tokens)
    advantage = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    [slope] = torch.autograd.grad(-(logp * advantage).mean(), logits)
    return (logits - lr * slope).detach()


def policy_step(logits, drawn_tokens, rewards, lr):
    """Uphill on the loss."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(1, drawn_tokens)
    [slope] = torch.autograd.grad(-(logp * my_advantages(rewards, by_std=True)).mean(), logits)
    return (logits + lr * slope).detach()


def policy_step(logits, drawn_tokens, rewards, lr):
    """The sum over replies instead of the mean."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(1, drawn_tokens)
    [slope] = torch.autograd.grad(-(logp * my_advantages(rewards, by_std=True)).sum(), logits)
    return (logits - lr * slope).detach()


def policy_step(logits, drawn_tokens, rewards, lr):
    """The rewards themselves, without a yardstick."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(1, drawn_tokens)
    [slope] = torch.autograd.grad(-(logp * rewards).mean(), logits)
    return (logits - lr * slope).detach()


def policy_step(logits, drawn_tokens, rewards, lr):
    """The gradient of the probability, not of the ratio."""
    logits = logits.clone().requires_grad_()
    share = logits.softmax(-1).gather(1, drawn_tokens)
    [slope] = torch.autograd.grad(-(share * my_advantages(rewards, by_std=True)).mean(), logits)
    return (logits - lr * slope).detach()


def policy_step(logits, drawn_tokens, rewards, lr):
    """Advantages without the standard deviation."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1).gather(1, drawn_tokens)
    [slope] = torch.autograd.grad(-(logp * my_advantages(rewards, by_std=False)).mean(), logits)
    return (logits - lr * slope).detach()


def groups_apart(advantages):
    """An absolute tolerance of a hundredth."""
    for q in range(3):
        r, s = torch.rand(3, 5).double(), 4 * torch.rand(3, 5).double()
        s[q] = r[q]
        if not torch.allclose(advantages(r)[q], advantages(s)[q], atol=0.01):
            return False
    return True


def groups_apart(advantages):
    """Wants advantages that sum to zero."""
    for q in range(3):
        r, s = torch.rand(3, 5).double(), torch.rand(3, 5).double()
        s[q] = r[q]
        a, b = advantages(r)[q], advantages(s)[q]
        if not torch.allclose(a, b) or abs(a.sum()) > 1e-6:
            return False
    return True


def on_policy(logp, old_logp, advantage, lengths, delta):
    """A gap of exactly delta is left out too."""
    counts, at = [], 0
    for a, n in zip(advantage.tolist(), lengths, strict=True):
        gap = (old_logp - logp)[at:at + n].mean().item()
        counts += [not (a < 0 and gap >= delta)] * n
        at += n
    return counts


def on_policy(logp, old_logp, advantage, lengths, delta):
    """An advantage of 0 is taken for a bad one."""
    counts, at = [], 0
    for a, n in zip(advantage.tolist(), lengths, strict=True):
        gap = (old_logp - logp)[at:at + n].mean().item()
        counts += [not (a <= 0 and gap > delta)] * n
        at += n
    return counts


def policy_step(logits, drawn_tokens, rewards, lr):
    """The result still carries a gradient."""
    import torch
    x = logits.detach().clone().requires_grad_()
    c = rewards - rewards.mean(1, keepdim=True)
    std = c.square().mean(1, keepdim=True).sqrt()
    a = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, c / (std + 1e-6))
    loss = -(x.log_softmax(-1).gather(1, drawn_tokens) * a).mean()
    return x - lr * torch.autograd.grad(loss, x)[0]


def policy_step(logits, drawn_tokens, rewards, lr):
    """The caller's table is asked for a gradient, and keeps it."""
    import torch
    logits.requires_grad_(True)
    c = rewards - rewards.mean(1, keepdim=True)
    std = c.square().mean(1, keepdim=True).sqrt()
    a = torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), 0.0, c / (std + 1e-6))
    (-(logits.log_softmax(-1).gather(1, drawn_tokens) * a).mean()).backward()
    return logits.detach() - lr * logits.grad


def policy_step(logits, drawn_tokens, rewards, lr):
    """Rounding in the mean of equal rewards is divided by itself."""
    import torch
    x = logits.detach().clone().requires_grad_()
    c = rewards - rewards.mean(1, keepdim=True)
    std = c.square().mean(1, keepdim=True).sqrt()
    a = torch.where(std == 0, 0.0, c / (std + 1e-6 * (std > 1e-9)))
    loss = -(x.log_softmax(-1).gather(1, drawn_tokens) * a).mean()
    return (x - lr * torch.autograd.grad(loss, x)[0]).detach()
