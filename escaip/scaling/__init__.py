"""Scaling-law studies (docs/scaling.md)."""
