"""Files that are not safetensors, by their first bytes: what they are, and what their owner can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONVERT = (
    "Convert it once, where nothing of value can be reached, with torch's loader that runs no code:\n"
    '  python -c "import sys, torch; from safetensors.torch import save_file; '
    "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); w = w.get('state_dict', w); "
    'save_file({k: v.contiguous().clone() for k, v in w.items() if torch.is_tensor(v)}, sys.argv[2])" '
    "OLD.ckpt NEW.safetensors\n"
    "If weights_only=True refuses the file, it holds more than weights: do not load it; "
    "look for a .safetensors release of the same model."
)


@dataclass(frozen=True)
class OtherFormat:
    what: str
    hint: str | None = None


def other_format(path: Path, first: bytes) -> OtherFormat | None:
    """What the file is that begins with the bytes *first*, or None where they are of no known other format."""
    renamed = " under the name of a safetensors file" if path.suffix == ".safetensors" else ""
    if first.startswith(b"PK\x03\x04"):
        return OtherFormat(
            f"it is a zip archive{renamed}, as torch.save writes: a pickle, which can run code when it is loaded",
            CONVERT,
        )
    if first[:1] == b"\x80" and 2 <= first[1] <= 5:
        return OtherFormat(
            f"it is a Python pickle{renamed} (.ckpt, .pt, .bin), which can run code when it is loaded", CONVERT
        )
    if first.startswith(b"GGUF"):
        return OtherFormat(
            "it is a GGUF file: quantised weights, which cannot be hardened", "Use the model's unquantised release."
        )
    if first.startswith(b"version https://git-lfs"):
        return OtherFormat(
            "it is a Git LFS pointer: the weights were never downloaded", "Run 'git lfs pull' in its repository."
        )
    if first.lstrip()[:1] == b"<":
        return OtherFormat(
            "it is a web page, probably an error page saved in place of the download", "Download the file again."
        )
    return None
