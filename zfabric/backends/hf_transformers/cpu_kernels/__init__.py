"""Kernels for a CPU, compiled by numba when they are first used: what torch does in many calls, in one."""
