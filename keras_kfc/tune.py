"""TEMPORARY."""

import json, os

TUNE = json.loads(os.environ.get("KFC_TUNE", "{}"))
