"""What a pass or a training step costs, measured side by side and checked."""
