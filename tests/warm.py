"""Imported once by the server that forks ranks: what torch and dp-accounting import at their first use."""

import ranks_at_work
import sklearn.datasets
import torch

import dpopt.training.run

__all__ = ["dpopt", "sklearn"]
ranks_at_work.Problem("plain", torch.float64).plan.epsilon_at(1)
