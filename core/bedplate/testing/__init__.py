# SPDX-License-Identifier: Apache-2.0
"""Tools for tests, ours and those of backend authors."""
