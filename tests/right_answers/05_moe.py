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
