"""One script per question; benchmarks/README.md has the command behind every published number."""
