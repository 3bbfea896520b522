"""Checks before a run: the machine, a configuration, memory and time, and a rehearsal on small replicas."""
