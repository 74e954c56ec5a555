"""Filters of privatized gradients, between `p.grad` and the optimizer."""

from dpopt.filters.kalman import Kalman

__all__ = ["Kalman"]
