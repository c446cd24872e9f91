"""The emulator of CUDA in csrc/emulator/: its build, its record of calls, and the faults that it is tested with."""
