"""Right answers to the exercises of notebook 11, unlike the reference."""


def learnt_tokens(ids, assistant, eos):
    """From tag to EOS, by places."""
    out, t = [False] * len(ids), 0
    while assistant in ids[t:]:
        t = ids.index(assistant, t) + 1
        end = ids.index(eos, t) if eos in ids[t:] else len(ids) - 1
        out[t:end + 1] = [True] * (end + 1 - t)
        t = end + 1
    return out


def learns_the_reply(loss):
    """Three turns, other words, two disturbances, no seed."""
    ids = torch.tensor([0, 2, 5, 6, 3, 7, 8, 9, 1, 2, 4, 3, 5, 6, 1, 2, 8, 9, 3, 4, 7, 1])
    learnt, speaks = [], False
    for token in ids.tolist():
        learnt.append(speaks)
        speaks = token == 3 or speaks and token != 1
    learnt = torch.tensor(learnt)
    logits = torch.randn(len(ids), 10)
    base = loss(logits, ids, learnt)
    for t in range(len(ids) - 1):
        other = logits.clone()
        other[t] += torch.randn(10)
        if bool((loss(other, ids, learnt) - base).abs() > 1e-7) != bool(learnt[t + 1]):
            return False
    return True


def sees(samples, t):
    """By index."""
    return list(range(samples.index(samples[t]), t + 1))
