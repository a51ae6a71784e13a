"""Wrong answers to the exercises of notebook 11; a docstring says what is wrong."""


def learnt_tokens(ids, assistant, eos):
    """EOS is not learnt: the reply never ends."""
    speaks, out = False, []
    for token in ids:
        speaks = speaks and token != eos
        out.append(speaks)
        speaks = speaks or token == assistant
    return out


def learnt_tokens(ids, assistant, eos):
    """The assistant's tag is learnt too, which the template writes."""
    speaks, out = False, []
    for token in ids:
        speaks = speaks or token == assistant
        out.append(speaks)
        speaks = speaks and token != eos
    return out


def learnt_tokens(ids, assistant, eos):
    """Once the assistant has spoken, everything is learnt: the second question too."""
    start = ids.index(assistant)
    return [i > start for i in range(len(ids))]


def learnt_tokens(ids, assistant, eos):
    """Only the last reply is learnt."""
    start = max(i for i, token in enumerate(ids) if token == assistant)
    return [i > start for i in range(len(ids))]


def learnt_tokens(ids, assistant, eos):
    """Shifted twice: true where the next token is learnt."""
    speaks, out = False, []
    for token in ids:
        speaks = (speaks or token == assistant) and token != eos
        out.append(speaks)
    return out


def learnt_tokens(ids, assistant, eos):
    """The tag that opens the reply is taken for the template's."""
    speaks, out = False, []
    for before, token in zip([None, *ids], ids, strict=False):
        out.append(speaks and before != assistant)
        speaks = (speaks or token == assistant) and token != eos
    return out


def learnt_tokens(ids, assistant, eos):
    """The whole conversation is learnt, the user's words and tags too."""
    return [True for _ in ids]


def sees(samples, t):
    """The other samples of the row are seen as well."""
    return list(range(t + 1))


def sees(samples, t):
    """Its own sample, with the future."""
    return [s for s in range(len(samples)) if samples[s] == samples[t]]


def sees(samples, t):
    """Does not see itself."""
    return [s for s in range(t) if samples[s] == samples[t]]


def sees(samples, t):
    """Places are counted from the beginning of its sample."""
    return list(range(samples[:t + 1].count(samples[t])))


def sees(samples, t):
    """The mask the wrong way round: the other samples."""
    return [s for s in range(t + 1) if samples[s] != samples[t]]


def history(talk):
    """The thoughts of earlier turns stay."""
    return [text if role == "user" else (thought or "") + "</think>" + text
            for role, thought, text in talk]


def history(talk):
    """The tag goes with the thought."""
    return [text for _, _, text in talk]


def history(talk):
    """The tag only where there was a thought."""
    return [text if thought is None else "</think>" + text for _, thought, text in talk]


def history(talk):
    """An empty thought with both tags, as in other models."""
    return [text if role == "user" else "<think></think>" + text for role, _, text in talk]


def history(talk):
    """Every turn has the tag, the user's too."""
    return ["</think>" + text for _, _, text in talk]


def history(talk):
    """The tag is put after the answer."""
    return [text if role == "user" else text + "</think>" for role, _, text in talk]


def learns_the_reply(loss):
    """One positive number."""
    value = loss(torch.randn(7, 9), torch.arange(7), torch.arange(7) > 3)
    return value.shape == () and bool(value > 0)


def learns_the_reply(loss):
    """The prompt is left alone: a forgotten EOS passes."""
    ids, learnt = torch.tensor([0, 2, 7, 3, 5, 8, 1]), torch.arange(7) > 3
    logits = torch.randn(7, 10)
    other = logits.clone()
    other[:3] += torch.randn(3, 10)
    return bool(loss(other, ids, learnt) == loss(logits, ids, learnt))


def learns_the_reply(loss):
    """The reply matters: so it does where everything is learnt."""
    ids, learnt = torch.tensor([0, 2, 7, 3, 5, 8, 1]), torch.arange(7) > 3
    logits = torch.randn(7, 10)
    return bool(loss(logits + torch.randn(7, 10), ids, learnt) != loss(logits, ids, learnt))


def learns_the_reply(loss):
    """The mask is one place late, as in the version that is wrong."""
    ids, learnt = torch.tensor([0, 2, 7, 3, 5, 8, 1]), torch.arange(7) > 3
    logits = torch.randn(7, 10)
    moved = []
    for t in range(6):
        other = logits.clone()
        other[t, ids[t + 1]] += 1
        moved.append(bool(loss(other, ids, learnt) != loss(logits, ids, learnt)))
    return moved == learnt[:-1].tolist()


def learns_the_reply(loss):
    """Better predictions everywhere give a lower loss."""
    ids, learnt = torch.tensor([0, 2, 7, 3, 5, 8, 1]), torch.arange(7) > 3
    logits = torch.randn(7, 10)
    other = logits.clone()
    other[torch.arange(6), ids[1:]] += 1
    return bool(loss(other, ids, learnt) < loss(logits, ids, learnt))


def learnt_tokens(ids, assistant, eos):
    """Hard-coded 3 and 1."""
    speaks, out = (False, [])
    for t in ids:
        out.append(speaks)
        if t == 3:
            speaks = True
        elif t == 1:
            speaks = False
    return out


def learnt_tokens(ids, assistant, eos):
    """Ends at user's tag 2, not at EOS."""
    speaks, out = (False, [])
    for t in ids:
        if t == 2:
            speaks = False
        out.append(speaks)
        if t == assistant:
            speaks = True
    return out


def learnt_tokens(ids, assistant, eos):
    """Crashes without a reply."""
    i = ids.index(assistant)
    out = [False] * (i + 1)
    speaks = True
    for t in ids[i + 1:]:
        out.append(speaks)
        if t == assistant:
            speaks = True
        elif t == eos:
            speaks = False
    return out


def sees(samples, t):
    """Window of 3."""
    return [s for s in range(max(0, t - 2), t + 1) if samples[s] == samples[t]]


def history(talk):
    """By parity of the place."""
    return ["</think>" * (i % 2) + text for i, (_, _, text) in enumerate(talk)]


def history(talk):
    """Text stripped."""
    return [text.strip() if role == "user" else "</think>" + text.strip() for role, _, text in talk]


def history(talk):
    """Empty texts dropped."""
    return [text if role == "user" else "</think>" + text for role, _, text in talk if text]


def learns_the_reply(loss):
    """Compares with the mean of nats_of."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1])
    learnt = torch.arange(7) > 3
    logits = torch.randn(7, 10)
    return torch.allclose(loss(logits, ids, learnt), nats_of(logits, ids)[learnt[1:]].mean())


def learns_the_reply(loss):
    """Compares with version_b."""
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1])
    learnt = torch.arange(7) > 3
    logits = torch.randn(7, 10)
    return bool((loss(logits, ids, learnt) - version_b(logits, ids, learnt)).abs() < 1e-05)


def learns_the_reply(loss):
    """The assistant's tag is not looked at."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1])
    learnt = torch.arange(7) > 3
    logits = torch.randn(7, 10)
    m = []
    for t in (0, 1, 3, 4, 5):
        o = logits.clone()
        o[t, ids[t + 1]] += 1
        m.append(bool(loss(o, ids, learnt) != loss(logits, ids, learnt)))
    return m == [False, False, True, True, True]


def learnt_tokens(ids, assistant, eos):
    """The smaller of the two ids is taken for EOS."""
    assistant, eos = max(assistant, eos), min(assistant, eos)
    speaks, out = False, []
    for token in ids:
        out.append(speaks)
        speaks = token == assistant or speaks and token != eos
    return out


def learns_the_reply(loss):
    """Four rows alone are disturbed."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1, 2, 6, 3, 9, 1])
    learnt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]) > 0
    logits, moved = torch.randn(12, 10), []
    for t in (2, 3, 7, 10):
        other = logits.clone()
        other[t, ids[t + 1]] += 1
        moved.append(bool(loss(other, ids, learnt) != loss(logits, ids, learnt)))
    return moved == [False, True, False, True]


def learns_the_reply(loss):
    """The row of the first EOS is left out."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1, 2, 6, 3, 9, 1])
    learnt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]) > 0
    logits = torch.randn(12, 10)
    for t in range(11):
        other = logits.clone()
        other[t, ids[t + 1]] += 1
        moved = bool(loss(other, ids, learnt) != loss(logits, ids, learnt))
        if t != 5 and moved != bool(learnt[t + 1]):
            return False
    return True


def learns_the_reply(loss):
    """The row of a middle word is left out."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1, 2, 6, 3, 9, 1])
    learnt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]) > 0
    logits = torch.randn(12, 10)
    for t in range(11):
        other = logits.clone()
        other[t, ids[t + 1]] += 1
        moved = bool(loss(other, ids, learnt) != loss(logits, ids, learnt))
        if t != 4 and moved != bool(learnt[t + 1]):
            return False
    return True


def learns_the_reply(loss):
    """The first two rows are left out."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 2, 7, 3, 5, 8, 1, 2, 6, 3, 9, 1])
    learnt = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]) > 0
    logits, moved = torch.randn(12, 10), []
    for t in range(2, 11):
        other = logits.clone()
        other[t, ids[t + 1]] += 1
        moved.append(bool(loss(other, ids, learnt) != loss(logits, ids, learnt)))
    return moved == learnt[3:].tolist()


def history(talk):
    """Spaces at the ends of an answer are cut."""
    return [text if role == "user" else "</think>" + text.strip() for role, _, text in talk]


def learnt_tokens(ids, assistant, eos):
    """Compares identities, which only small numbers share."""
    mask, on = [], False
    for t in ids:
        mask.append(on)
        on = True if t is assistant + 0 else False if t is eos + 0 else on
    return mask


def learnt_tokens(ids, assistant, eos):
    """Token 7, a user's word in the check, is never learned."""
    mask, on = [], False
    for t in ids:
        mask.append(on and t != 7)
        on = True if t == assistant else False if t == eos else on
    return mask


def sees(samples, t):
    """Sample 0 has no number."""
    return [s for s in range(t + 1) if samples[s] == samples[t]] if samples[t] or t == 0 else [t]


def sees(samples, t):
    """A window of sixteen tokens."""
    return [s for s in range(t + 1) if samples[s] == samples[t]][-16:]


def sees(samples, t):
    """Compares identities, which only small numbers share."""
    return [
        s
        for s in range(t + 1)
        if samples[s] == samples[t] and (not isinstance(samples[s], int) or 0 <= samples[s] < 256)
    ]


def history(talk):
    """A text with a tag of its own gets none."""
    return [
        ("</think>" if role == "assistant" and not text.startswith("</think>") else "") + text
        for role, _, text in talk
    ]


def learns_the_reply(loss):
    """A change must be larger than a hundredth."""
    ids, learnt = torch.randint(0, 9, (10,)), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 1, 0]) > 0
    logits = torch.randn(10, 9).double()
    base = loss(logits, ids, learnt)
    for t in range(10):
        o = logits.clone()
        o[t] = 5 * torch.randn(9)
        o[t, ids[(t + 1) % 10]] = -9
        if bool((loss(o, ids, learnt) - base).abs() > 0.02) != (t < 9 and bool(learnt[t + 1])):
            return False
    return True
