"""The ground floor: what a task, a trajectory and a group are. Imports none of the other rooms."""
