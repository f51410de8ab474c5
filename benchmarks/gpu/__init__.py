"""The parts of `make gpu-check`: what runs on a machine with a GPU, under time limits, and what it found."""
