"""Tools behind gRPC, run in a warm pool of hardened containers."""

import os

# gRPC reads this variable when it is imported. Without it, its C core logs a line for every handshake that fails, so that
# anyone who finds the port could fill the gateway's log. `GRPC_VERBOSITY=INFO` shows these lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
