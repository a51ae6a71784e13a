"""Reinforcement learning: rollouts."""
