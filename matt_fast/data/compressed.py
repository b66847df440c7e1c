"""Files that gzip, bzip2, xz or zstd compressed, read as a stream; known by the ending of their name."""

import io
from pathlib import PurePath

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
SIGNS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zX": "xz",
    b"BZh9": "bz2",
    b"PK\x03\x04": "zip",
}
BUFFER = 1 << 20  # bytes read at a time


def ending_of(file: PurePath) -> str:
    """ ".jsonl", or ".jsonl.gz" of a compressed file; in small letters."""
    last = file.suffix.lower()
    return (PurePath(file.stem).suffix.lower() if last in COMPRESSIONS else "") + last


def format_ending(file: PurePath) -> str:
    """ ".jsonl" of what is compressed, too; in small letters."""
    return (PurePath(file.stem) if compression_of(file) else file).suffix.lower()


def compression_of(file: PurePath) -> str | None:
    """ "gzip", "bz2", "xz" or "zstd" by the ending of its name; None for a file that is not compressed."""
    return COMPRESSIONS.get(file.suffix.lower())


def unpacked(stream: io.BufferedReader, file: PurePath, argument: str) -> io.BufferedReader:
    """What a file holds, without its compression; `stream` itself where it has none.

    Args:
        stream: the bytes of the file.
        file: its name, which tells how it is compressed.
        argument: what errors call the source.

    Raises (while reading):
        ValueError: it is cut off or damaged, or compressed otherwise.
    """
    kind = compression_of(file)
    return stream if kind is None else io.BufferedReader(_Unpacked(stream, kind, file, argument), BUFFER)


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: io.BufferedReader, kind: str, file: PurePath, argument: str):
        self.wanted, self.place = f"{argument}: wanted a whole {kind} file", repr(str(file))
        if not stream.peek(1):  # of which a library would say that it holds nothing
            raise ValueError(f"{self.wanted}, got no bytes in {self.place}")
        if kind == "xz":
            self.inside: io.RawIOBase = _Xz(stream)
        else:
            import pyarrow as pa

            self.inside = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), kind)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fills the buffer, so that who looks at the beginning sees it, however small the parts are."""
        buffer, filled = memoryview(buffer), 0
        try:
            while filled < len(buffer) and (count := self.inside.readinto(buffer[filled:])):
                filled += count
            return filled
        except (OSError, EOFError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk
                raise
            raise ValueError(f"{self.wanted}, got {error} in {self.place}") from error


class _Xz(io.RawIOBase):
    """Streams of xz, one behind another. LZMAFile takes a damaged one behind the first for the end."""

    def __init__(self, stream: io.BufferedReader):
        import lzma

        self.stream, self.new, self.failure = stream, lzma.LZMADecompressor, lzma.LZMAError
        self.decompressor = self.new()

    def readinto(self, buffer: memoryview) -> int:
        while True:
            packed = b""
            if self.decompressor.eof:
                rest = self.decompressor.unused_data.lstrip(b"\0")  # streams may be padded by zeros
                while not rest and (packed := self.stream.read(BUFFER)):
                    rest = packed.lstrip(b"\0")
                if not rest:
                    return 0
                packed = rest
                self.decompressor = self.new()
            elif self.decompressor.needs_input:
                packed = self.stream.read(BUFFER)
                if not packed:
                    raise EOFError("the end of the file inside of a stream")
            try:
                data = self.decompressor.decompress(packed, len(buffer))
            except self.failure as error:
                raise EOFError(str(error)) from error
            if data:
                buffer[: len(data)] = data
                return len(data)
