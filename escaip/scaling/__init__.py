"""Scaling laws of a study's runs, with intervals and what speaks against them."""
