"""Metrics, logs and audit on their way to the control plane: one engine, three pipelines (docs/contract/telemetry.md
§2).

Sources put entries into the window of their pipeline; the pipeline cuts batches, sends them, and moves a source's
position once it is known what became of its entries. `window`, `trial`, `reaction`, `gaps`, `counters`, `standing` and
`records` decide and do no I/O; `pipeline` carries out what they decide, `spooled` keeps what has no other home.
"""
