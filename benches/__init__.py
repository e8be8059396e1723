"""Benchmarks: asv across commits (bench_*.py), peers side by side (side_by_side.py), criterion in rust/."""
