"""The kinds of targets: what their sections are, how they are loaded, fed, fitted and judged."""
