"""Right answers to the exercises of notebook 12, unlike the reference."""


def groups_apart(advantages):
    """Rewards 0 and 1 as in the notebook, ten draws."""
    torch.manual_seed(0)
    for _ in range(10):
        rewards = (torch.rand(4, 6, dtype=torch.float64) > 0.5).double()
        for question in range(4):
            other = (torch.rand(4, 6, dtype=torch.float64) > 0.3).double()
            other[question] = rewards[question]
            if not torch.allclose(advantages(rewards)[question], advantages(other)[question]):
                return False
    return True


def groups_apart(advantages):
    """One other question at a time."""
    torch.manual_seed(0)
    rewards = torch.randn(4, 3, dtype=torch.float64)
    before = advantages(rewards)
    for changed in range(4):
        other = rewards.clone()
        other[changed] = 5 * torch.randn(3, dtype=torch.float64)
        rest = [n for n in range(4) if n != changed]
        if (advantages(other)[rest] - before[rest]).abs().max() > 1e-9:
            return False
    return True


def gain(ratio, advantage, low, high):
    """By cases."""
    if advantage > 0:
        return min(ratio, 1 + high) * advantage
    return max(ratio, 1 - low) * advantage


def advantages_v32(rewards):
    """With torch."""
    import torch
    r = torch.tensor(rewards, dtype=torch.float64)
    return (r - r.mean(1, keepdim=True)).tolist()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Reply by reply, clipped by the sign of the advantage."""
    total = 0
    ratio = (logp - old_logp).exp()
    bounded = torch.where(advantage > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low))
    ahead = ref_logp - logp
    each = beta * (ahead.exp() - 1 - ahead) - bounded * advantage
    for reply in each.split(lengths):
        total = total + reply.sum() * token_weight(len(reply), lengths, how, longest)
    return total


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Divided at the end, by what the weights stand for."""
    ratio = torch.exp(logp - old_logp)
    loss = -torch.min(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
    loss = loss + beta * (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1)
    if how == "tokens":
        return loss.mean()
    parts = loss.split(lengths)
    if how == "sequence":
        return sum(part.mean() for part in parts) / len(parts)
    return loss.sum() / longest / len(parts)


def on_policy(logp, old_logp, advantage, lengths, delta):
    """All replies at once."""
    reply = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    gone = torch.zeros(len(lengths), dtype=logp.dtype).index_add(0, reply, old_logp - logp)
    left_out = (advantage < 0) & (gone / torch.tensor(lengths) > delta)
    return (~left_out)[reply].tolist()


def on_policy(logp, old_logp, advantage, lengths, delta):
    """With a position that moves."""
    kept, at = [], 0
    for i, n in enumerate(lengths):
        far = sum((old_logp[t] - logp[t]).item() for t in range(at, at + n)) / n > delta
        kept.extend([bool(advantage[i] >= 0) or not far for _ in range(n)])
        at += n
    return kept


def policy_step(logits, drawn_tokens, rewards, lr):
    """The gradient of log p times the advantage."""
    table = torch.nn.Parameter(logits.clone())
    logp = torch.log_softmax(table, 1).gather(1, drawn_tokens)
    (-logp * my_advantages(rewards, by_std=True)).mean().backward()
    return table.data - lr * table.grad


def policy_step(logits, drawn_tokens, rewards, lr):
    """The gradient by hand: one-hot minus probabilities."""
    a = my_advantages(rewards, by_std=True)
    hot = torch.nn.functional.one_hot(drawn_tokens, logits.size(1)).to(logits)
    push = ((hot - logits.softmax(-1).unsqueeze(1)) * a.unsqueeze(-1)).sum(1)
    return logits + lr * push / rewards.numel()


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Reply by reply, with split; the minimum as a choice by sign."""
    import torch
    old, ref, a = old_logp.detach(), ref_logp.detach(), advantage.detach()
    ratio = torch.exp(logp - old)
    gain = torch.where(a >= 0, ratio.clamp(max=1 + high) * a, ratio.clamp(min=1 - low) * a)
    k3 = torch.exp(ref - logp) + (logp - ref) - 1
    loss = 0.0
    for part in (beta * k3 - gain).split(lengths):
        if how == "sequence":
            loss = loss + part.mean() / len(lengths)
        elif how == "tokens":
            loss = loss + part.sum() / len(logp)
        else:
            loss = loss + part.sum() / longest / len(lengths)
    return loss


def grpo_loss(logp, old_logp, ref_logp, advantage, lengths, low, high, beta, how, longest):
    """Token by token in a list."""
    import torch
    owner = [n for n in lengths for _ in range(n)]
    terms = []
    for i, n in enumerate(owner):
        r = (logp[i] - old_logp[i].detach()).exp()
        a, d = advantage[i].detach(), ref_logp[i].detach() - logp[i]
        gain = torch.minimum(r * a, r.clip(1 - low, 1 + high) * a) - beta * (d.exp() - d - 1)
        share = {"sequence": n, "tokens": None, "constant": longest}[how]
        terms.append(gain / (len(owner) if share is None else share * len(lengths)))
    return -torch.stack(terms).sum()


def on_policy(logp, old_logp, advantage, lengths, delta):
    """split and a nested comprehension."""
    gaps = [part.mean() for part in (old_logp - logp).split(lengths)]
    keep = [bool(a >= 0 or gap <= delta) for a, gap in zip(advantage, gaps, strict=True)]
    return [flag for flag, n in zip(keep, lengths, strict=True) for _ in range(n)]


def policy_step(logits, drawn_tokens, rewards, lr):
    """By hand: the pushes cancel in the softmax, so only the drawn tokens move."""
    Q, G = rewards.shape
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True, correction=0)
    same = rewards.max(1, keepdim=True).values == rewards.min(1, keepdim=True).values
    a = ((rewards - mean) / (std + 1e-6)).masked_fill(same, 0.0)
    return logits.detach().scatter_add(1, drawn_tokens, a * lr / (Q * G))


def policy_step(logits, drawn_tokens, rewards, lr):
    """A parameter, ratios with a clip, and an optimizer."""
    import torch
    p = torch.nn.Parameter(logits.clone())
    groups = []
    for group in rewards:
        d = group - group.mean()
        same = bool((group == group[0]).all())
        groups.append(torch.zeros_like(d) if same else d / (d.pow(2).mean().sqrt() + 1e-6))
    a = torch.stack(groups)
    logp = torch.log_softmax(p, 1).gather(1, drawn_tokens)
    ratio = (logp - logp.detach()).exp()
    optimizer = torch.optim.SGD([p], lr=lr)
    (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()).backward()
    optimizer.step()
    return p.detach()
