"""Decide what becomes of every expert, under a budget. No torch."""
