"""Reinforcement learning: rollouts, objectives, rewards, examination."""
