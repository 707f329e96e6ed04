"""How good a model is, and how far it agrees with the one it came from."""
