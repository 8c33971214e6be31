# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of running one model on several ranks."""
