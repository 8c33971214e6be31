# SPDX-License-Identifier: Apache-2.0
"""The conformance kit: says whether a backend is right, by checks that ship with the core.

Three doors to the same checks: ``bedplate conformance --backend NAME``; pytest with
``-p bedplate.conformance.plugin --pyargs bedplate.conformance --backend NAME``; and one line
in a vendor's own test module, ``from bedplate.conformance.suite import *``.

``levels`` holds the checks, one module per level; ``cases`` the inputs that they share with
timing, the support table and recorded runs; ``subject`` the backend under examination;
``examine`` turns a check into one of five results, and ``report`` writes them down.
"""
