# SPDX-License-Identifier: Apache-2.0
"""The contract's meaning in plain torch: obvious, complete, slow.

A backend inherits from what stands here and overrides what it does faster; tests compare
every backend with it.
"""
