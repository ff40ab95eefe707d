"""Stochastic Activation Pruning: the reference, one file per fast backend, and the layer."""

from sapcore.sap.layer import SAP, sap, with_sap

__all__ = ["SAP", "sap", "with_sap"]
