# SPDX-License-Identifier: Apache-2.0
"""Recorded graphs: which sizes, static input slots, capture, choice and replay."""
