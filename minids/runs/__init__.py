"""Shared by every program that learns: checkpoints, the learner, the optimizers."""
