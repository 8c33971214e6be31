# SPDX-License-Identifier: Apache-2.0
"""Transformers models on our attention and memory: probe, bridge, weights, fusion."""
