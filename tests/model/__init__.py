"""The whole surface against a small reference: any order of what clients, workers, clocks and deaths may do.

``scripts`` are workflows that do what their input says; ``reference`` knows what the trace of such a workflow must be; ``machine``
does things to the real database, by the product's own code, and holds it against the reference.
"""
