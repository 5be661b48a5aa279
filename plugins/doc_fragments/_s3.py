# Copyright: The lab.audio maintainers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How modules of this collection reach the object store. Private: it may change with any release."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  endpoint_url:
    description:
      - URL of the object store, for example V(https://swift.example.edu:8080).
      - Taken from the environment variable E(S3_ENDPOINT) of the host if not given.
    type: str
  access_key:
    description:
      - Access key. Taken from E(S3_ACCESS_KEY) of the host, or from a file in O(credentials_directory), if not given.
    type: str
  secret_key:
    description:
      - Secret key. Taken from E(S3_SECRET_KEY) of the host, or from a file in O(credentials_directory), if not given.
    type: str
  credentials_directory:
    description:
      - Directory on the host with the files C(s3_access_key) and C(s3_secret_key). So no secret is needed in a task.
      - What is given otherwise, or is in the environment, comes first.
      - Taken from E(CREDENTIALS_DIRECTORY) of the host if not given.
    type: path
  bucket:
    description:
      - Name of the bucket. Taken from E(S3_BUCKET) of the host if not given, and V(audio-pipeline) without that.
    type: str
  region:
    description:
      - Region that requests are signed for. Swift refuses a wrong one.
      - Taken from E(S3_REGION) of the host if not given, and V(us-east-1) without that.
    type: str
  ca_bundle:
    description:
      - File on the host with the certificates of authorities to trust, where the system's do not do.
      - Taken from E(S3_CA_BUNDLE) of the host if not given.
    type: path
"""
