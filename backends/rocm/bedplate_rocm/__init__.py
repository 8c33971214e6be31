# SPDX-License-Identifier: Apache-2.0
"""The ROCm backend; see README.md."""
