"""What a run will take, before it runs: memory, time and the cheapest way that fits, from configurations alone."""
