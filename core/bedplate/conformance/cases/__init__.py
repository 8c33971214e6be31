# SPDX-License-Identifier: Apache-2.0
"""Inputs as data: one list for tests, timing, the support table and recorded runs."""
