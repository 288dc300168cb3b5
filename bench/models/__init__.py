"""Whole models on real data: the benchmark's last word."""
