"""What audit records say, taken apart and put into one form: Linux audit, the Kubernetes audit log. No I/O here."""
