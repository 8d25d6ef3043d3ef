"""What `repro bench` measures: ratios, side by side in one process."""
