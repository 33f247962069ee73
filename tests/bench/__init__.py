"""Figures, printed and never asserted: `make bench`. What is compared runs in one go, in turns."""
