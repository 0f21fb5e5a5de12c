"""The commands, up to where something heavy begins."""
