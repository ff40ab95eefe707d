"""Attacks in pixel units (0-255): each a short loop over estimate, step, project."""

from sapcore.attacks.fgsm import fgsm, fgsm_direction
from sapcore.attacks.iterative import iterative
from sapcore.attacks.noise import noise

__all__ = ["fgsm", "fgsm_direction", "iterative", "noise"]
