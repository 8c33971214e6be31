# SPDX-License-Identifier: Apache-2.0
"""Which requests run, on which slots, and what each pass computes."""
