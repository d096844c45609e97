"""A ChunkService in Python, for files of at most 1,024 bytes: the other half of a peer, for the tests.

A file of several pieces would need a manifest with piece hashes and a proof, and for that BLAKE3's subtree values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from blake3 import blake3
from sprat.v1 import chunk_pb2 as chunk
from sprat.v1 import chunk_pb2_grpc as chunk_rpc
from sprat_client import Member

NOT_FOUND = chunk.ContentError(code=chunk.ContentError.CODE_NOT_FOUND)


class SmallFiles(chunk_rpc.ChunkServiceServicer):
    """Serves `files` to members on `port` until it is left; with `answer`, a liar's bytes instead of the files'."""

    def __init__(self, member: Member, files: Sequence[bytes], answer: bytes | None = None) -> None:
        self.files = {blake3(data).digest(): data if answer is None else answer for data in files}
        own = [(member.key, member.certificate)]
        # A certificate of the network is required; there are no reading rights beneath that.
        credentials = grpc.ssl_server_credentials(own, member.authority, require_client_auth=True)
        self.server = grpc.server(ThreadPoolExecutor(4))
        chunk_rpc.add_ChunkServiceServicer_to_server(self, self.server)
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)

    def __enter__(self) -> SmallFiles:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop(grace=None).wait()

    def GetManifest(self, request: chunk.GetManifestRequest, context: object) -> Iterator[chunk.GetManifestResponse]:
        for index, content in enumerate(request.content_ids):
            if content in self.files:
                # Up to 1,024 bytes the last chunk is the whole file, and the proof of its size is done with it.
                file = self.files[content]
                header = chunk.ManifestHeader(size=len(file), last_chunk=file)
                yield chunk.GetManifestResponse(index=index, header=header)
            else:
                yield chunk.GetManifestResponse(index=index, error=NOT_FOUND)

    def GetChunks(self, request: chunk.GetChunksRequest, context: object) -> Iterator[chunk.GetChunksResponse]:
        for index, wanted in enumerate(request.ranges):
            data = self.files.get(wanted.content_id)
            if data is None:
                yield chunk.GetChunksResponse(error=chunk.RangeError(range=index, error=NOT_FOUND))
                continue
            step = max(16 << 10, min(request.chunk_length, 1 << 20))
            for offset in range(0, len(data), step):
                part = chunk.Chunk(range=index, offset=offset, data=data[offset : offset + step])
                yield chunk.GetChunksResponse(chunk=part)
