"""Weights going out to and coming in from other programs."""
