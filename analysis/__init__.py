"""Analysis of trained models, one module per question; scripts/analyze.py runs them and writes a report."""
