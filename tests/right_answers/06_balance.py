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
