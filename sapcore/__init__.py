"""sapcore: a reproducible replication of Stochastic Activation Pruning (Dhillon et al., ICLR 2018)."""
