"""Tools behind gRPC, run in a warm pool of hardened containers."""
