"""The configuration: what can be set (`models`), how a file is read (`document`), where values come from (`load`)."""
