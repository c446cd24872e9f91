"""The emulator of CUDA in csrc/emulator/: its build, its recorded calls, and the faults that test it."""
