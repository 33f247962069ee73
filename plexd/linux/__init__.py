"""The only room that touches the kernel or starts programs. It observes and applies; it decides nothing."""
