"""The basic types and functions: tasks, trajectories and groups. This room imports only `storage`."""
