# SPDX-License-Identifier: Apache-2.0
"""Sizes, request rows, slots, and storage of keys and values."""
