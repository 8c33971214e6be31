# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of attention that belongs to no single backend."""
