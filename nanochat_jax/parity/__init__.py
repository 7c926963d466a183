"""Comparing what this package computes with a folder of reference numbers, file by file."""
