"""Identity and evidence: Pith records, receipts, replication records and bundles, in pure Python.

This package imports nothing of `repro` or `papers`, and neither torch nor numpy, so that it can be lifted out and
used alone.
"""
