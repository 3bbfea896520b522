"""Train, evaluate and serve AnyRes high-resolution vision-language models of the LLaVA-NeXT family."""

__version__ = "0.1.0.dev0"
