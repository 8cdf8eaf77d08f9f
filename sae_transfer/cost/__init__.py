"""What a study costs before it runs: FLOPs, memory traffic, memory, disk and hours; without torch."""
