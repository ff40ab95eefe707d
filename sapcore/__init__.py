"""sapcore: a reproducible replication of Stochastic Activation Pruning (Dhillon et al., ICLR 2018)."""

from sapcore import attacks, checkpoints, data, evaluation
from sapcore.sap import SAP, sap, with_sap

__all__ = ["SAP", "attacks", "checkpoints", "data", "evaluation", "sap", "with_sap"]
