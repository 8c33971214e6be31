# SPDX-License-Identifier: Apache-2.0
"""Requests in, tokens and text out."""
