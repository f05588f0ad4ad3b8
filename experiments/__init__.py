"""The study and the benchmarks."""
