"""Reinforcement learning: rollouts, rewards, advantages, losses and the PPO learner."""
