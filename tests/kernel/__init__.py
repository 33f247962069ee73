"""Tests that run inside the QEMU guest, and what boots it."""
