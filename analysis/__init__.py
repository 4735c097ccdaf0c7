"""What the paper asks of a trained model, a module per question; scripts/analyze.py asks them and writes a report."""
