"""Code that must not run by itself."""

raise SystemExit
