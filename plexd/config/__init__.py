"""The configuration: what can be set (`models`), how a file is read (`document`), where values come from (`layers`),
and all of it at once (`load`). Nothing is imported here, because who asks the daemon needs next to nothing of it.
"""
