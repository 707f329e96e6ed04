"""The report page, its text and its pictures."""
