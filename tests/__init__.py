"""What `python -m pytest` runs; a package, so that `python -m tests.chaos` finds it before any other of that name."""
