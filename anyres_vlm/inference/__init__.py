"""A loaded model that answers, and generation from packed prompts."""
