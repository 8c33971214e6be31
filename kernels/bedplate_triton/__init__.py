# SPDX-License-Identifier: Apache-2.0
"""Kernels in plain Triton, one module an operation, for every backend whose device runs them.

Separate from the backends, because the sources name no vendor: what differs between devices
is data.  Backends import the modules one by one; this one imports neither torch nor triton.
"""
