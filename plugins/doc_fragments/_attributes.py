# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What is documented once for all modules of this collection. Private: it may change with any release."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and says what the run would change, without changing anything.
  diff_mode:
    description: Returns what was changed, or in C(check_mode) would be, when in diff mode.
  idempotent:
    description: When run twice in a row without outside changes, the second run changes nothing.
  async:
    description: Supports being used with the C(async) keyword.
  platform:
    description: Target operating systems.
"""

    ACTION_GROUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/lab.audio.all) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - lab.audio.all
"""
