# SPDX-License-Identifier: Apache-2.0
from bedplate.conformance import *  # noqa: F403
