"""The commands, with all checks that come before heavy imports."""
