# SPDX-License-Identifier: Apache-2.0
"""A simulated accelerator for Bedplate; see ``plugin`` for its hooks."""
