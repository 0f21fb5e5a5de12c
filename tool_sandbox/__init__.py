"""Tools behind gRPC, run in a warm pool of hardened containers."""

import os

# Read when gRPC is imported. Else its C core writes a line for every handshake that fails, in the gateway's log, too, which
# then anyone can fill who finds the port. `GRPC_VERBOSITY=INFO` shows them.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
