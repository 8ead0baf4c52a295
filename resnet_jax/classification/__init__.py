"""The classification task: loss and steps, evaluation."""
