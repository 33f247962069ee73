"""Benchmarks: figures and ratios for a reader. Nothing here is asserted; each module measures one subject."""
