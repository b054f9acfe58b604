"""What a hub id's checkpoint holds, from its headers alone, so that sizes are known before gigabytes are fetched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..json_file import read_object
from .checkpoint import Checkpoint, ConvertError, Entry


class Preview(Checkpoint):
    """A checkpoint on the hub: names, types and shapes, and nothing to read. `absent` bytes are still to be fetched."""

    def __init__(self, name: str, config: Path, entries: list[Entry], absent: int) -> None:
        self.directory, self.files, self._descriptors = Path(name), [], {}
        self.absent = absent
        self.config = read_object(config, ConvertError)
        self.tensors = {e.name: e for e in entries}

    def read(self, entry: Entry, first: int, last: int) -> bytearray:
        """Nothing was fetched."""
        raise ConvertError(f"{entry} is on the hub, not here")


def preview(source: str, revision: str | None) -> Preview | None:
    """A hub id's checkpoint, from its config and headers; None where the hub can't be asked (offline, say)."""
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    # The hub's own error derives from that of its HTTP library, which differs between its versions.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        config = Path(hf_hub_download(source, "config.json", revision=revision))
        files = get_safetensors_metadata(source, revision=revision).files_metadata
    except NotASafetensorsRepoError as e:
        raise ConvertError(f"{source} has no safetensors: {e}") from e
    except (OSError, transport, SafetensorsParsingError):
        return None
    entries = [
        Entry(
            name=name,
            dtype=info.dtype,
            shape=tuple(info.shape),
            file=Path(file),
            begin=info.data_offsets[0],
            size=info.data_offsets[1] - info.data_offsets[0],
        )
        for file, part in files.items()
        for name, info in part.tensors.items()
    ]
    return Preview(source, config, entries, _absent(source, revision, entries))


def cache_directory() -> Path:
    """Where the hub's files go."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _absent(source: str, revision: str | None, entries: list[Entry]) -> int:
    """Bytes that aren't in the hub's cache yet; the beginning of a file whose download broke off is."""
    from huggingface_hub import try_to_load_from_cache

    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[str(entry.file)] += entry.size
    absent = sum(
        size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(source, file, revision=revision), str)
    )
    blobs = cache_directory() / f"models--{source.replace('/', '--')}" / "blobs"
    return max(0, absent - sum(part.stat().st_size for part in blobs.glob("*.incomplete")))
