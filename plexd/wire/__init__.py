"""What travels between node and control plane. Pure: bytes in, values out, and back."""
