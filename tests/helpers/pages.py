"""The pages that people read."""

from imports import ROOT

SITE = sorted((ROOT / "docs").rglob("*.md"))
READ = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")), *SITE]
