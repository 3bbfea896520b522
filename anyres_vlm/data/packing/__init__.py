"""Pack samples by their lengths into optimizer steps."""
