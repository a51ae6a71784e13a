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
