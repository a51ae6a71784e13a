"""What every program that learns shares: checkpoints, the learner, the optimizers."""
