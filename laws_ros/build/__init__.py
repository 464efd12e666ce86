"""Offline: workloads, training, library growth, evaluation. torch, mujoco and gymnasium are imported here only."""
