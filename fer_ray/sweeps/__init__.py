"""Sweeps on Ray Tune: what varies, the trials, and what they show."""
