"""The command `anyres`: one thin file a command, nothing heavy imported until a command runs."""
