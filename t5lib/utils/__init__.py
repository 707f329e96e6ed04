"""What every part of t5lib uses: settings, errors, files, progress."""
