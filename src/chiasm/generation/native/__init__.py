"""The decoding step in C++: `step.cpp` is compiled once on a machine, and called through ctypes."""
