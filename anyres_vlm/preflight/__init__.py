"""What is tried before a run: `anyres rehearse` runs the whole of it on small replicas of its models."""
