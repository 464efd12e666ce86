"""The method itself: standard library and numpy only (docs/architecture.md)."""
