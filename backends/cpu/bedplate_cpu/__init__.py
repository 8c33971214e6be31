# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: default, reference for speed claims, and the example to copy."""
