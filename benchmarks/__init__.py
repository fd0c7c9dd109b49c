"""How fast condgan is, beside the plain way, a peer and the machine's limit; run ``python -m benchmarks``."""
