# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a module's secrets come from. Private: it may change with any release."""

from __future__ import annotations

import os

from ansible.module_utils.basic import AnsibleModule


def credential(module: AnsibleModule, option: str, name: str) -> str | None:
    """A secret: given, from the environment, or from the file `name` in `credentials_directory`; None if nowhere."""
    directory = module.params["credentials_directory"]
    if module.params[option] or not directory:
        return module.params[option]
    if not os.path.isdir(directory):
        module.fail_json(msg=f"credentials_directory: {directory} is not a directory")
    path = os.path.join(directory, name)
    try:
        with open(path, encoding="utf-8") as file:
            value = file.read().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{path} cannot be read: {error}")
    if not value:
        module.fail_json(msg=f"{path} is empty")
    module.no_log_values.add(value)
    return value
