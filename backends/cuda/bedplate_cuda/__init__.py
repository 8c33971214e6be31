# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend; see ``plugin`` for its hooks."""
