"""Where work runs: on one device, or on the replicas of a strategy."""
