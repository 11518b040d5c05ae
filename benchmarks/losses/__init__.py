"""Losses measured side by side: cases, who is measured (eager formulas, ours, peers), checks, reports.

``python -m benchmarks`` runs the dense losses, ``python -m benchmarks.forms`` the other forms.
"""
