"""Callbacks for other libraries' trainers: `integrations.transformers` and `integrations.lightning`.

Each module imports its library, so that this package needs neither.
"""
