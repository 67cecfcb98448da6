"""Runs as an older version left them."""

import json

from stages.foundation.files import digest
from stages.run_directory.folders import manifest_hash


def forget(folder, stage, setting):
    """Rewrite a manifest as a version would have that did not know the setting."""
    path = folder.run / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["settings"][setting]
    manifest["fingerprint"] = digest(manifest["identity"])
    manifest["sha256"] = manifest_hash({key: value for key, value in manifest.items() if key != "sha256"})
    path.write_text(json.dumps(manifest))
