"""What a model can do: questions with exact answers, scored by task."""
