"""Scaling-law studies: which runs, their cost, and the laws they obey."""
